"""Any Gymnasium env by words: what each option of the adapter decides, and what can't be played."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from vlm_agents.config import GymnasiumConfig
from vlm_agents.envs import check_contract, is_known, make_env
from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.errors import ConfigError, EnvError


class Stairs(gymnasium.Env[Any, Any]):
    """Actions 5 and 6 go down and up three stairs; above pays `top`, below -1, and both end it."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium reads it off the class)

    def __init__(self, render_mode: str | None = None, top: float = 1.0, drawn: Any = (10, 20)) -> None:
        self.render_mode, self.top, self.drawn = render_mode, top, drawn
        self.action_space = gymnasium.spaces.Discrete(2, start=5)
        self.observation_space = gymnasium.spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.at = 1
        return self._told()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.at += 1 if action == 6 else -1
        reward = self.top if self.at == 3 else -1.0 if self.at < 0 else 0.0
        seen, info = self._told()
        return seen, reward, self.at in (3, -1), False, info

    def _told(self) -> tuple[Any, dict]:
        info = {"mask": np.array([self.at > 0, True]), "won": self.at == 3, "floor": {"at": np.int64(self.at)}}
        return {"half": np.array([self.at // 2])}, info

    def render(self) -> Any:
        return np.full((*self.drawn, 3), 50 * self.at + 50, np.uint8)


class Blind(Stairs):
    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012


register: Any = gymnasium.register  # takes a class too, whatever its type says
register("tests/Stairs-v0", Stairs, max_episode_steps=6)
register("tests/Endless-v0", Stairs)
register("tests/Blind-v0", Blind, max_episode_steps=6)


def config(**settings: Any) -> GymnasiumConfig:
    base = {"id": "tests/Stairs-v0", "actions": ["down", "up"], "instructions": "Climb."}
    return GymnasiumConfig(**(base | settings))


def climbed(**settings: Any) -> GymnasiumEnv:
    env = make_env(config(**settings))
    assert isinstance(env, GymnasiumEnv)
    env.reset(0)
    env.step("up")
    return env


@pytest.mark.parametrize(
    "settings",
    [{}, {"legal": "mask"}, {"state": "picture"}, {"state": "floor"}, {"success": "won"}, {"success_return": 0.5}],
    ids=lambda settings: str(*settings),
)
def test_every_option_keeps_the_contract(settings: dict[str, Any]) -> None:
    check_contract(lambda: make_env(config(**settings)))


def test_words_are_actions_wherever_the_space_begins() -> None:
    env = climbed()
    assert env.instructions == "Climb. Actions: down, up."
    step = env.step("up")
    assert (step.reward, step.terminated, step.success) == (1.0, True, 1.0)


def test_a_passing_turn_steps_no_game_but_counts() -> None:
    env = make_env(config())
    before = env.reset(0)
    steps = [env.step(word) for word in (None, "fly", "up", "down", None, None)]
    assert [step.legal for step in steps] == [0, 0, 1, 1, 0, 0]
    assert steps[1].observation == before
    assert [step.truncated for step in steps] == [False] * 5 + [True]  # the id's own limit is six


def test_our_limit_takes_the_place_of_the_id_s() -> None:
    env = make_env(config(max_steps=9))
    env.reset(0)
    assert [env.step(None).truncated for _ in range(9)] == [False] * 8 + [True]


def test_what_is_legal_is_the_mask_s() -> None:
    env = make_env(config(legal="mask"))
    assert env.reset(0).legal_actions == ("down", "up")
    step = env.step("down")
    assert step.observation.legal_actions == ("up",)
    assert env.step("down").legal == 0.0


@pytest.mark.parametrize(
    ("settings", "top", "success"),
    [
        ({}, 1.0, 1.0),
        ({}, 0.0, 0.0),  # the last reward isn't above 0
        ({"success": "won"}, 0.0, 1.0),
        ({"success_return": 2.0}, 1.0, 0.0),
        ({"success_return": 2.0}, 2.0, 1.0),
    ],
)
def test_what_success_is(settings: dict[str, Any], top: float, success: float) -> None:
    assert climbed(kwargs={"top": top}, **settings).step("up").success == success


@pytest.mark.parametrize(("state", "changed"), [("observation", 0.0), ("picture", 1.0), ("floor", 1.0)])
def test_what_names_the_state(state: str, changed: float) -> None:
    """From stair 0 to 1 the observation, which is half of it, is the same; the picture isn't."""
    env = make_env(config(state=state))
    env.reset(0)
    env.step("down")
    assert env.step("up").changed == changed


@pytest.mark.parametrize(("picture", "size"), [(None, (20, 10)), (40, (40, 20)), (8, (8, 4))])
def test_the_longest_side_of_a_picture(picture: int | None, size: tuple[int, int]) -> None:
    assert make_env(config(picture=picture)).reset(0).images[0].size == size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"id": "tests/Stars-v0"},
            r"env\.id=tests/Stars-v0: no such id.*Did you mean 'tests/Stairs-v0'\?.*env\.module=",
        ),
        ({"module": "no_such_package"}, r"env\.module=no_such_package: there is no module no_such_package in /"),
        ({"actions": ["up"]}, r"env\.actions has 1 words, and tests/Stairs-v0 has 2 actions, 5 to 6"),
        ({"actions": ["up"], "id": "tests/Endless-v0"}, r"env\.actions has 1 words.*; env\.id=.*set env\.max_steps"),
        ({"id": "Pendulum-v1"}, r"has the actions Box.*only Discrete ones"),
        ({"id": "tests/Blind-v0"}, r"can't be drawn: its render modes are ansi, no rgb_array"),
        ({"id": "tests/Endless-v0"}, r"no limit of its own.*set env\.max_steps"),
        ({"kwargs": {"tops": 1}}, r"can't be made with env\.kwargs=\{'tops': 1\}: .*tops"),
        ({"kwargs": {"render_mode": "ansi"}}, r"env\.kwargs: render_mode can't be set there"),
    ],
)
def test_what_cannot_be_played_is_said_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((EnvError, ConfigError), match=said) as raised:
        make_env(config(**settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"legal": "masks"}, r"env\.legal=masks: info of .* has no such key, it has mask, won, floor"),
        ({"state": "flor"}, r"env\.state=flor: info of"),
        ({"legal": "floor"}, r"env\.legal=floor: its mask has 1 entries for 2 actions"),
        ({"kwargs": {"drawn": (10,)}}, "draws ndarray, and no"),
    ],
)
def test_what_an_info_or_a_picture_lacks(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EnvError, match=said):
        make_env(config(**settings)).reset(0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"actions": ["up", "up"]}, "each action needs a word of its own"),
        ({"success": "won", "success_return": 1.0}, "leave one out"),
        ({"kwargs": [1]}, "env.kwargs must be settings"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**settings)


def test_an_id_may_name_its_module_as_in_gymnasium() -> None:
    cfg = config(id="gymnasium.envs:FrozenLake-v1")
    assert (cfg.module, cfg.id) == ("gymnasium.envs", "FrozenLake-v1")
    assert is_known(cfg)


def test_an_id_is_looked_up_without_making_it() -> None:
    assert is_known(config(actions=["too", "many", "words"]))
    with pytest.raises(EnvError, match="no such id"):
        is_known(config(id="tests/Nothing-v0"))
