"""What the four card games have in common: the contract, seeds, passing turns, limits, observations, compat."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlm_agents.config import BlackjackConfig, CardsConfig, EZPointsConfig, NumberLineConfig, PointsConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.base import check_contract
from vlm_agents.envs.gym_cards import CardEnv
from vlm_agents.envs.gym_cards.cards import Card
from vlm_agents.errors import ConfigError, EnvError

GAMES = (NumberLineConfig, BlackjackConfig, EZPointsConfig, PointsConfig)
INFO = {
    "number_line": {"target", "current"},
    "blackjack": {"player_cards", "dealer_card"},
    "ezpoints": {"cards", "numbers", "formula"},
    "points24": {"cards", "numbers", "formula"},
}
OPTIONS: list[CardsConfig] = [
    *(game(observation=what, compat=compat) for game in GAMES for what in ("text", "both") for compat in ("rl4vlm",)),
    *(game(observation=what) for game in GAMES for what in ("image", "text", "both")),
    *(game(max_steps=3) for game in GAMES),
    NumberLineConfig(highest=20),
    BlackjackConfig(natural=True),
    EZPointsConfig(target=20, faces="rank"),
    EZPointsConfig(target=24, cards=3),
    PointsConfig(target=10, cards=2, solvable_only=True),
    PointsConfig(target=13, cards=3, faces="rank", solvable_only=True),
]


def label(cfg: CardsConfig) -> str:
    return f"{cfg.family}-{cfg.observation}-{cfg.compat}-{cfg.max_steps}"


@pytest.mark.parametrize("cfg", OPTIONS, ids=label)
def test_every_game_keeps_the_contract(cfg: CardsConfig) -> None:
    check_contract(lambda: make_env(cfg), seeds=tuple(range(8)))


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("kwargs", [{}, {"compat": "rl4vlm"}], ids=["ours", "rl4vlm"])
def test_the_registered_envs_are_clean(game: type[CardsConfig], kwargs: dict) -> None:
    if game is NumberLineConfig:
        kwargs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(game.id, render_mode="rgb_array", **kwargs).unwrapped)


@pytest.mark.parametrize("game", GAMES)
def test_infos_hold_what_they_promise(game: type[CardsConfig]) -> None:
    env = gymnasium.make(game.id)
    _, info = env.reset(seed=0)
    assert set(info) == INFO[game.family] | {"success", "legal"}
    assert set(env.step(0)[-1]) == set(info)


TRACE = """
import hashlib, sys
import gymnasium, numpy as np
import vlm_agents.envs
for name in ("NumberLine", "Blackjack", "EZPoints", "Points24"):
    env, seen = gymnasium.make(f"vlm_agents/{name}-v0"), hashlib.sha256()
    rng = np.random.default_rng(1)
    pixels, info = env.reset(seed=7)
    for _ in range(50):
        pixels, reward, terminated, truncated, info = env.step(int(rng.integers(env.action_space.n)))
        if terminated or truncated:
            env.reset()  # goes on with the generator that the seed made
        seen.update(pixels.tobytes())
        seen.update(repr((reward, terminated, truncated, info)).encode())
    print(name, seen.hexdigest())
"""


def test_one_seed_is_one_course_of_events_in_two_processes() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].split()) == 8


@pytest.mark.parametrize("game", GAMES)
def test_two_envs_with_one_seed_stay_equal(game: type[CardsConfig]) -> None:
    one, other = gymnasium.make(game.id), gymnasium.make(game.id)
    rng = np.random.default_rng(0)
    now, twin = one.reset(seed=3), other.reset(seed=3)
    other.action_space.seed(99)
    for _ in range(50):
        np.testing.assert_array_equal(now[0], twin[0])
        assert now[1:] == twin[1:]
        action = int(rng.integers(len(one.unwrapped.words)))  # type: ignore[attr-defined]
        now, twin = one.step(action), other.step(action)
        if now[2] or now[3]:
            now, twin = one.reset(), other.reset()


@pytest.mark.parametrize("game", GAMES)
def test_different_seeds_give_different_games(game: type[CardsConfig]) -> None:
    env = CardEnv(game())
    assert len({env.reset(seed).state_key for seed in range(60)}) > 20


@pytest.mark.parametrize(("game", "turns"), list(zip(GAMES, (10, 20, 7, 22), strict=True)))
@pytest.mark.parametrize("word", [None, "no such word"])
def test_turns_that_pass_change_nothing_and_end(game: type[CardsConfig], turns: int, word: str | None) -> None:
    env = CardEnv(game())
    before = env.reset(0)
    steps = [env.step(word) for _ in range(turns)]
    assert [step.truncated for step in steps] == [False] * (turns - 1) + [True]
    assert {step.observation.state_key for step in steps} == {before.state_key}
    assert {step.reward for step in steps} == {0.0}
    assert (steps[0].success, steps[0].legal, steps[0].changed) == (False, False, False)
    with pytest.raises(EnvError, match="no episode is running"):
        env.step(word)


@pytest.mark.parametrize("game", GAMES)
def test_max_steps_truncates(game: type[CardsConfig]) -> None:
    env = CardEnv(game(max_steps=2))
    env.reset(0)
    assert [env.step(None).truncated for _ in range(2)] == [False, True]


@pytest.mark.parametrize("game", GAMES)
def test_observation_says_whether_there_are_pictures(game: type[CardsConfig]) -> None:
    image, text, both = (CardEnv(game(observation=what)).reset(4) for what in ("image", "text", "both"))
    assert (len(image.images), len(text.images), len(both.images)) == (1, 0, 1)
    assert image.images[0].size == (300, 300)
    assert both.text == text.text
    assert len(text.text) > len(image.text)


@pytest.mark.parametrize("game", GAMES)
def test_a_step_s_picture_is_its_own(game: type[CardsConfig]) -> None:
    env = gymnasium.make(game.id)
    first, _ = env.reset(seed=0)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(env.unwrapped.render(), kept)  # type: ignore[arg-type]


# ---- compat ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("game", GAMES)
def test_unread_actions_are_random_and_counted(game: type[CardsConfig]) -> None:
    env = CardEnv(game(compat="rl4vlm"))
    counts, passed = 0, 0
    for seed in range(400):
        env.reset(seed)
        step = env.step(None)
        assert (step.legal, step.metrics["random_action"]) == (0.0, 1.0)
        counts += step.changed
        passed += step.reward != 0
    # Something is done: all but NumberLine's bumps at an edge change the state, most of the time.
    assert counts > 300
    assert passed > 40
    env.reset(0)
    assert env.step(env.words[0]).metrics["random_action"] == 0.0


def test_random_actions_are_uniform() -> None:
    env = CardEnv(PointsConfig(compat="rl4vlm"))
    symbols = dict.fromkeys([*env.words, " "], 0)
    for seed in range(3400):
        env.reset(seed)
        before = env.game.turn
        step = env.step(None)
        assert env.game.turn == before + 1
        symbols["=" if step.terminated else env.game.formula[0]] += 1  # type: ignore[union-attr]
    # 3400 / 17 = 200 of each sign, sd 13.7
    assert all(140 < symbols[word] < 260 for word in ("+", "-", "*", "/", "(", ")", "="))
    assert sum(symbols.values()) == 3400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PointsConfig(cards=5), "env.cards=5 must lie between 2 and 4"),
        (lambda: PointsConfig(faces="eleven"), "env.faces=eleven"),
        (lambda: PointsConfig(compat="rlvlm"), "env.compat=rlvlm is not one of ours, rl4vlm. Did you mean 'rl4vlm'"),
        (lambda: PointsConfig(target=0), "env.target=0"),
        (lambda: BlackjackConfig(observation="picture"), "env.observation=picture"),
        (lambda: NumberLineConfig(highest=1), "env.highest=1 must lie between 2 and 99"),
        (lambda: PointsConfig(id="vlm_agents/EZPoints-v0"), "this game's id is vlm_agents/Points24-v0"),
    ],
)
def test_settings_are_checked(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("game", GAMES)
def test_what_is_no_action_is_refused(game: type[CardsConfig]) -> None:
    env = gymnasium.make(game.id).unwrapped
    env.reset(seed=0)
    for action in (-1, env.action_space.n, None, "stand", 0.5):  # type: ignore[attr-defined]
        with pytest.raises(EnvError, match="its actions are 0 to"):
            env.step(action)
    env.step(np.int64(0))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("NumberLine", {"highest": 1}, "highest=1 must lie between 2 and 99"),
        ("NumberLine", {"highest": 100}, "highest=100 must lie between 2 and 99"),
        ("Blackjack", {"compat": "rlvlm"}, "Did you mean 'rl4vlm'"),
        ("Points24", {"compat": "rlvlm"}, "Did you mean 'rl4vlm'"),
        ("Points24", {"faces": "eleven"}, "faces=eleven is not one of ten, rank"),
        ("Points24", {"kind": "points"}, "kind=points is not one of ezpoints, points24"),
        ("Points24", {"target": 0}, "target=0 must be at least 1"),
        ("Points24", {"cards": 5}, "cards=5 must lie between 2 and 4"),
        ("EZPoints", {"cards": 0}, "cards=0 must lie between 2 and 4"),
    ],
)
def test_gymnasium_make_checks_its_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gymnasium.make(f"vlm_agents/{name}-v0", **settings)


def test_pictures_have_the_size_that_is_asked_for() -> None:
    assert CardEnv(NumberLineConfig(size=224)).reset(0).images[0].size == (224, 224)


def test_a_state_is_known_by_what_the_player_sees() -> None:
    env = CardEnv(BlackjackConfig())
    assert env.reset(0).state_key
    hidden = env.game.dealer[1]  # type: ignore[union-attr]
    before = env.game.state
    env.game.dealer[1] = Card(hidden.rank % 13 + 1, hidden.suit)  # type: ignore[union-attr]
    assert env.game.state == before
