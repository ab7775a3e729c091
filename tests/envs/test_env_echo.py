"""Echo: the Gymnasium env, and its adapter to words."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import vlm_agents.envs  # noqa: F401  (registers the id)
from vlm_agents.config import EchoConfig
from vlm_agents.envs.echo import COLORS, NAMES, EchoEnv


def shown(env: EchoEnv, pixels: np.ndarray) -> str:
    """The colour of the picture, read off one pixel as a player would."""
    return next(name for name in env.words if COLORS[name] == tuple(pixels[0, 0]))


def test_the_registered_env_is_clean() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("vlm_agents/Echo-v0", colors=8, turns=5).unwrapped)


@pytest.mark.parametrize("turns", [1, 3, 7])
def test_naming_every_colour_earns_one(turns: int) -> None:
    env = EchoEnv(EchoConfig(turns=turns))
    now = env.reset(5)
    steps = []
    for turn in range(turns):
        assert now.text == f"Turn {turn + 1} of {turns}. Name the colour."
        steps.append(env.step(shown(env, np.asarray(now.images[0].image))))
        now = steps[-1].observation
    assert [step.reward for step in steps] == [1 / turns] * turns
    assert [step.terminated for step in steps] == [False] * (turns - 1) + [True]
    assert [step.success for step in steps] == [0.0] * (turns - 1) + [1.0]


def test_one_wrong_answer_costs_its_share_and_the_success() -> None:
    env = EchoEnv(EchoConfig(colors=2, turns=4))
    now = env.reset(0)
    steps = []
    for turn in range(4):
        right = shown(env, np.asarray(now.images[0].image))
        wrong = "red" if right == "green" else "green"
        steps.append(env.step(wrong if turn == 2 else right))
        now = steps[-1].observation
    assert [step.reward for step in steps] == [0.25, 0.25, 0.0, 0.25]
    assert steps[-1].terminated
    assert steps[-1].success == 0.0


def test_no_answer_is_never_the_right_one() -> None:
    env = EchoEnv(EchoConfig(colors=2, turns=50))
    env.reset(0)
    assert sum(env.step(word).reward for word in [None, "crimson"] * 25) == 0.0


def test_max_steps_truncates() -> None:
    env = EchoEnv(EchoConfig(turns=3, max_steps=2))
    env.reset(0)
    first, second = env.step(None), env.step(None)
    assert (first.terminated, first.truncated) == (False, False)
    assert (second.terminated, second.truncated) == (False, True)


def test_max_steps_at_the_end_is_an_end() -> None:
    env = EchoEnv(EchoConfig(turns=2, max_steps=2))
    env.reset(0)
    env.step(None)
    last = env.step(None)
    assert (last.terminated, last.truncated) == (True, False)


def test_all_colours_come_and_differ_clearly() -> None:
    env = EchoEnv(EchoConfig(colors=8, turns=200))
    env.reset(3)
    assert {NAMES[answer] for answer in env.game.answers} == set(COLORS)
    values = np.array(list(COLORS.values()), dtype=int)
    apart = np.abs(values[:, None] - values[None]).sum(-1) + 1000 * np.eye(8, dtype=int)
    assert apart.min() >= 120  # out of 765


def test_the_picture_is_one_colour() -> None:
    now = EchoEnv(EchoConfig()).reset(1)
    assert now.images[0].size == (56, 56)
    assert len(np.unique(np.asarray(now.images[0].image).reshape(-1, 3), axis=0)) == 1
