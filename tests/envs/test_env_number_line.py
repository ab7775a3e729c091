"""NumberLine against its rules, told again from outside, and the chances of its deals."""

from collections import Counter

import numpy as np
import pytest

from vlm_agents.config import NumberLineConfig
from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.number_line import NumberLineGame


def expected(target: int, start: int, moves: list[int], highest: int, limit: int) -> list[tuple]:
    """(position, reward, terminated, truncated) of each move, from a table of the line."""
    line = list(range(highest + 1))
    rows, at = [], start
    for number, move in enumerate(moves, 1):
        to = line[at - 1] if move == 0 and at > 0 else line[at + 1] if move == 1 and at < highest else at
        won = to == target
        nearer = (target > at and to == at + 1) or (target < at and to == at - 1)
        rows.append((to, 1 if won else 0 if nearer else -1, won, number == limit and not won))
        at = to
        if won or number == limit:
            break
    return rows


@pytest.mark.parametrize("highest", [5, 9])
def test_random_episodes_follow_the_rules(highest: int) -> None:
    game, rng = NumberLineGame(highest), np.random.default_rng(highest)
    for seed in range(10_000 if highest == 5 else 1000):
        _, info = game.reset(seed=seed)
        moves = rng.integers(2, size=2 * highest).tolist()
        rows = expected(info["target"], info["current"], moves, highest, 2 * highest)
        for move, row in zip(moves, rows, strict=False):
            _, reward, terminated, truncated, info = game.step(move)
            assert (info["current"], reward, terminated, truncated) == row
            assert info["success"] == terminated
            assert info["legal"]


def test_deals_have_the_original_s_chances() -> None:
    game, count = NumberLineGame(), 36_000
    targets, distances = Counter(), Counter()
    for seed in range(count):
        game.reset(seed=seed)
        targets[game.target] += 1
        distances[abs(game.target - game.current)] += 1
    # Out of 36: a target has 5 starts beside it, and one more where start and target were equal and the target moved
    # on (0 to 1, ..., 3 to 4, 4 to 0, 5 to 1). At 1000 a share, 6 shares have an sd of 71.
    for shares, seen in (((6, 7, 6, 6, 6, 5), targets), ((0, 14, 8, 6, 6, 2), distances)):
        for value, share in enumerate(shares):
            assert abs(seen[value] - 1000 * share) < 400, (value, seen)


def test_random_play_has_the_original_s_success() -> None:
    """Published as chance: 61.1 % reach the target in 10 steps, 28.3 % without one wrong step."""
    ours, theirs = CardEnv(NumberLineConfig()), CardEnv(NumberLineConfig(compat="rl4vlm"))
    rng, reached, clean, count = np.random.default_rng(0), 0.0, 0.0, 2500
    for seed in range(count):
        for env in (ours, theirs):
            env.reset(seed)
            over = False
            while not over:
                step = env.step(env.words[rng.integers(2)] if env is ours else None)
                over = step.terminated or step.truncated
                reached += step.success if env is ours else 0
                clean += step.success if env is theirs else 0
    assert reached / count == pytest.approx(0.611, abs=0.039)  # 4 sd of 0.0098
    assert clean / count == pytest.approx(0.283, abs=0.036)  # 4 sd of 0.0090


def test_a_slip_is_success_here_and_none_there() -> None:
    for compat, success in (("ours", 1.0), ("rl4vlm", 0.0)):
        env = CardEnv(NumberLineConfig(compat=compat))
        env.reset(0)
        env.game.target, env.game.current = 3, 1  # type: ignore[union-attr]
        rewards = [env.step(word).reward for word in ("-", "+", "+")]
        last = env.step("+")
        assert rewards == [-1.0, 0.0, 0.0]
        assert (last.reward, last.terminated, last.success) == (1.0, True, success)


def test_at_an_edge_nothing_moves_and_it_costs() -> None:
    env = CardEnv(NumberLineConfig())
    env.reset(0)
    env.game.target, env.game.current = 3, 0  # type: ignore[union-attr]
    env.step(None)
    step = env.step("-")
    assert (step.reward, step.legal, step.changed) == (-1.0, 1.0, 0.0)


def test_what_it_says() -> None:
    env = CardEnv(NumberLineConfig(observation="text"))
    now = env.reset(0)
    env.game.target, env.game.current = 4, 1  # type: ignore[union-attr]
    assert now.legal_actions == ("-", "+")
    assert env.step("+").observation.text == "Target: 4\nCurrent: 2"
    assert CardEnv(NumberLineConfig()).reset(0).text == ""
    assert env.instructions == "Number line: move Current to Target, one step a turn. Actions: -, +."
