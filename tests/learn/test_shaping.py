"""What is added to rewards: by hand, and what each bonus promises."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_agents.errors import TrainingError
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.kl_reward import KlReward
from vlm_agents.learn.shaping import (
    CountBonus,
    TurnShaper,
    overlong,
    penalised,
    progress,
    tools,
    unreadable,
    with_bonuses,
)
from vlm_agents.tensors import Renderer, reply_row
from vlm_agents.types import Advice, Observation, Parsed, Reply, Step, Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]


def walk(
    distances: Sequence[int | None], over: bool = True, rewards: Sequence[float] = (), seed: int = 0
) -> Trajectory:
    """An episode through states so far from success, each named after its distance; `over`: it terminated."""
    seen = [Observation("now", state_key=str(distance), advice=Advice("", "go", distance)) for distance in distances]
    turns = []
    for at, (before, after) in enumerate(pairwise(seen)):
        last = at == len(seen) - 2
        reward = rewards[at] if rewards else 0.0
        step = Step(after, reward, over and last, last and not over, over and last, True, True)
        turns.append(Turn(before, (), Reply("go", (2,), (9, 1), (-1.0, -1.0)), Parsed("go"), step))
    return Trajectory("line", seed, "model", tuple(turns), "success" if over else "time_limit")


def bonuses(episode: Trajectory, name: str) -> list[float]:
    return [turn.bonuses.get(name, 0.0) for turn in episode.turns]


# ---- states that are new ---------------------------------------------------------------------------------------------
def test_a_state_is_worth_less_each_time_it_is_reached():
    shaper = CountBonus(0.6)
    (one, other), _ = shaper.reward([walk([3, 2, 3, 2]), walk([3, 2, 1])])
    # reached are 2, 3, 2: for the first, first and second time; and 2, 1, each in that episode for the first
    assert bonuses(one, "count") == pytest.approx([0.6, 0.6, 0.6 / 2**0.5])
    assert bonuses(other, "count") == pytest.approx([0.6, 0.6])
    assert [turn.reward for turn in one.turns] == bonuses(one, "count")
    assert [turn.step for turn in one.turns] == [turn.step for turn in walk([3, 2, 3, 2]).turns]
    (later,), _ = shaper.reward([walk([3, 2, 9])])
    assert bonuses(later, "count") == pytest.approx([0.6 / 4**0.5, 0.6])  # 2 was reached three times before


def test_equal_plays_reach_what_is_equally_new():
    shaped, _ = CountBonus(0.6).reward([walk([3, 2, 1])] * 8)
    assert {tuple(bonuses(one, "count")) for one in shaped} == {(0.6, 0.6)}


def test_states_without_a_name_are_not_counted():
    (turn,) = (episode := walk([1, 0])).turns
    nameless = replace(turn, step=replace(turn.step, observation=Observation("now")))
    with pytest.raises(TrainingError, match=r"^line names no states .*: set algo.count_coef=0"):
        CountBonus(1.0).reward([replace(episode, turns=(nameless,))])


def test_what_was_reached_survives_a_checkpoint():
    shaper, resumed = CountBonus(1.0), CountBonus(1.0)
    shaper.reward([walk([3, 2, 1])] * 3)
    torch.save(shaper.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    told = [bonuses(one.reward([walk([3, 2, 9])])[0][0], "count") for one in (shaper, resumed)]
    assert told[0] == told[1] == [0.5, 1.0]
    assert resumed.state_dict() == shaper.state_dict() == {"counts": {"2": 4, "1": 3, "9": 1}}


# ---- progress --------------------------------------------------------------------------------------------------------
def test_progress_is_paid_step_by_step():
    episode = walk([4, 3, 5, 0])
    # potentials -1, -3/4, -5/4, and 0 after the end
    assert progress(2.0, 1.0)(episode) == pytest.approx([0.5, -1.0, 2.5])
    assert progress(2.0, 0.5)(episode) == pytest.approx([2 * (-0.375 + 1), 2 * (-0.625 + 0.75), 2 * 1.25])
    # cut off in a state of -5/4; and in one from which the expert knows no way, which counts as the start
    assert progress(2.0, 1.0)(walk([4, 3, 5], over=False)) == pytest.approx([0.5, -1.0])
    assert progress(2.0, 1.0)(walk([4, 3, None], over=False)) == pytest.approx([0.5, -0.5])
    # a prompt that became too long is an end: 0 comes after
    assert progress(2.0, 1.0)(replace(walk([4, 3, 5], over=False), stop="too_long")) == pytest.approx([0.5, 1.5])
    assert progress(2.0, 1.0)(replace(episode, turns=())) == []


@given(
    distances=st.lists(st.integers(0, 9), min_size=2, max_size=8),
    over=st.booleans(),
    gamma=st.sampled_from([0.5, 0.98, 1.0]),
)
def test_all_progress_together_is_the_difference_of_two_potentials(distances: list[int], over: bool, gamma: float):
    found = progress(0.7, gamma)(walk(distances, over))
    whole, steps = max(1, distances[0]), len(found)
    end = 0.0 if over else -distances[-1] / whole
    summed = sum(gamma**t * bonus for t, bonus in enumerate(found))
    assert summed == pytest.approx(0.7 * (gamma**steps * end + distances[0] / whole), abs=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("coef", [0.3, 5.0])
def test_progress_leaves_the_best_policy_what_it_was(gamma: float, coef: float):
    """States 2, 1 and 0 before success: in each one may go on, or leave with a small reward, or go back.

    At gamma 0.9 going is best everywhere (0.9^2 > 0.4), at 0.5 leaving is from state 2 (0.5^2 < 0.4): both stay so.
    """
    ways = {"on": -1, "leave": None, "back": 1}

    def worth(start: int, policy: Sequence[str], shaped: bool) -> float:
        at, over, distances, rewards = start, False, [start], list[float]()
        while len(rewards) < 60:
            way = ways[policy[at]]
            rewards.append(0.4 if way is None else float(at == 0 and way == -1))
            over = way is None or at + way < 0
            distances.append(0 if way is None or over else min(2, at + way))
            if over:
                break
            at = distances[-1]
        # distance to success is one more than the state's number
        episode = walk([distance + 1 for distance in distances], over, rewards)
        if shaped:
            (episode,), _ = TurnShaper("progress", progress(coef, gamma)).reward([episode])
        return sum(gamma**t * turn.reward for t, turn in enumerate(episode.turns))

    policies = list(product(ways, repeat=3))
    for start in range(3):
        best = [max(policies, key=lambda policy: worth(start, policy, shaped)) for shaped in (False, True)]
        assert worth(start, best[1], False) == pytest.approx(worth(start, best[0], False), abs=1e-9)
        assert best[0][start] == ("leave" if gamma == 0.5 and start == 2 else "on")


@pytest.mark.parametrize("advice", [None, Advice("", "go", None)])
def test_progress_asks_for_an_expert_who_counts(advice: Advice | None):
    episode = walk([2, 1])
    turn = replace(episode.turns[0], observation=replace(episode.turns[0].observation, advice=advice))
    with pytest.raises(TrainingError, match=r"line/seed 0: .*set algo\.progress_coef=0"):
        progress(1.0, 1.0)(replace(episode, turns=(turn,)))


# ---- penalties -------------------------------------------------------------------------------------------------------
def test_a_reply_is_charged_for_the_last_tokens_before_its_limit(make_turn: MakeTurn, make_episode: MakeEpisode):
    lengths = [1, 15, 16, 17, 18, 20]
    episode = make_episode(*(make_turn([2], [9] * length) for length in lengths))
    # DAPO: (limit - buffer - length) / buffer, here of 20 and a fifth of that
    expected = [0.0, 0.0, 0.0, -0.25 * 0.5, -0.5 * 0.5, -0.5]
    assert overlong(0.5, 20, 0.2)(episode) == pytest.approx(expected)


def counted(make_turn: MakeTurn, calls: int, pictures: int) -> Turn:
    turn = make_turn([2], [9])
    return replace(turn, step=replace(turn.step, metrics={"tool_calls": calls, "tool_pictures": pictures}))


def test_tools_earn_where_the_episode_succeeds(make_turn: MakeTurn, make_episode: MakeEpisode):
    """Counts are of the episode so far: code in turns 0, 1 and 3; pictures, two at once, in turn 1."""
    turns = [counted(make_turn, *counts) for counts in ((1, 0), (2, 2), (2, 2), (3, 2), (3, 2))]
    right = make_episode(*turns, stop="success")
    assert tools(0.1)(right) == [0.1, 0.1, 0.0, 0.1, 0.0]
    assert tools(1.2, once=True)(right) == [0.0, 1.2, 0.0, 0.0, 0.0]
    wrong = replace(right, stop="failure")
    assert tools(0.1)(wrong) == tools(1.2, once=True)(wrong) == [0.0] * 5


def test_tools_are_counted_by_the_env(make_turn: MakeTurn, make_episode: MakeEpisode):
    for once, name in ((False, "tool_coef"), (True, "tool_once_coef")):
        with pytest.raises(TrainingError, match=rf"doesn't count its tool_\w+: set algo\.{name}=0"):
            tools(0.1, once)(make_episode(make_turn([2], [9])))


def test_an_episode_with_an_unreadable_reply_is_charged_once(make_turn: MakeTurn, make_episode: MakeEpisode):
    good, bad = make_turn([2], [9]), replace(make_turn([2], [9]), parsed=Parsed(None, error="no code or answer"))
    assert unreadable(0.2)(make_episode(bad, bad, good)) == [0.0, 0.0, -0.2]
    assert unreadable(0.2)(make_episode(good, good)) == [0.0, 0.0]


def test_replies_without_a_legal_action_are_charged(make_turn: MakeTurn, make_episode: MakeEpisode):
    good, bad = make_turn([2], [9], 1.0), replace(make_turn([2], [9], 1.0), parsed=Parsed(None, error="no action"))
    (found,) = penalised([make_episode(good, bad)], 0.3)
    assert [turn.reward for turn in found.turns] == [1.0, 0.7]
    assert [dict(turn.bonuses) for turn in found.turns] == [{}, {"invalid": -0.3}]
    assert [turn.step.reward for turn in found.turns] == [1.0, 1.0]


def test_bonuses_stand_beside_each_other(make_turn: MakeTurn, make_episode: MakeEpisode):
    episode = make_episode(make_turn([2], [9], 1.0), make_turn([2], [9], 2.0))
    found = with_bonuses(with_bonuses(episode, "one", [0.25, 0.0]), "other", [-0.5, 0.125])
    assert [dict(turn.bonuses) for turn in found.turns] == [{"one": 0.25, "other": -0.5}, {"other": 0.125}]
    assert found.total_reward == 1.0 + 0.25 - 0.5 + 2.0 + 0.125


# ---- the distance to the reference -----------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [10_000, 1])
def test_a_turn_is_charged_for_the_log_ratio_of_its_tokens(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode, budget: int
):
    rng, agent, expected, episodes = np.random.default_rng(0), tiny_agent(), [], []
    for seed, lengths in enumerate([(2, 3), (1,), (), (4, 1, 2)]):
        turns, before = [], [2, 3]
        for length in lengths:
            reply = rng.integers(2, 12, length).tolist()
            reference = agent.score([reply_row("born", before, reply, ())]).logprobs.tolist()
            sampled = (np.array(reference) + rng.normal(size=length)).tolist()
            turns.append(make_turn(before, reply, 1.0, logprobs=sampled))
            before = [*before, *reply, 4]
            expected.append(1.0 - 0.2 * (sum(sampled) - sum(reference)))  # what the reference says more often earns
        episodes.append(make_episode(*turns, seed=seed, stop="success" if turns else "env_error"))
    with torch.no_grad():
        agent.policy.bias.add_(torch.randn(12))  # what the policy has become is no matter
    shaped, told = KlReward(agent, renderer, 0.2, Shares(budget)).reward(episodes)
    assert [turn.reward for one in shaped for turn in one.turns] == pytest.approx(expected, abs=1e-4)
    tokens = 2 + 3 + 1 + 4 + 1 + 2
    assert told["ppo/kl_reference"] == pytest.approx((len(expected) - sum(expected)) / 0.2 / tokens, abs=1e-3)


def test_nothing_is_charged_where_nothing_was_said(tiny_agent: Any, renderer: Renderer, make_episode: MakeEpisode):
    """The learner says what is wrong with such episodes."""
    episodes = [make_episode(stop="env_error")]
    assert KlReward(tiny_agent(), renderer, 0.2, Shares(100)).reward(episodes)[0] == episodes
