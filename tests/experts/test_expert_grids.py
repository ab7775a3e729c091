"""FrozenLake and Sokoban: their seeds, experts whose ways are shortest, and what they say of the picture."""

import re
from typing import cast

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from vlm_agents.config import GymnasiumConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.frozen_lake import FrozenLakeGame
from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.envs.sokoban import SokobanGame, played
from vlm_agents.errors import ConfigError
from vlm_agents.experts import with_expert
from vlm_agents.seeds import TRAINING_SEEDS

WORDS = ["left", "down", "right", "up"]


def config(name: str, **kwargs: object) -> GymnasiumConfig:
    expert = {"FrozenLake": "frozen_lake:FrozenLakeExpert", "Sokoban": "sokoban:SokobanExpert"}[name]
    return GymnasiumConfig(
        id=f"vlm_agents/{name}-v0",
        actions=WORDS,
        instructions="Play.",
        max_steps=100,
        kwargs=kwargs,
        expert=f"vlm_agents.experts.{expert}",
    )


@pytest.mark.parametrize("name", ["FrozenLake", "Sokoban"])
def test_the_registered_games_are_clean(name: str) -> None:
    check_env(gymnasium.make(f"vlm_agents/{name}-v0", render_mode="rgb_array").unwrapped, skip_render_check=True)


def lake(rows: list[str], at: int = 0) -> tuple[GymnasiumEnv, FrozenLakeGame]:
    env = make_env(config("FrozenLake"))
    assert isinstance(env, GymnasiumEnv)
    env.reset(0)
    game = cast(FrozenLakeGame, env.game)
    game.lake = type(game.lake)("rgb_array", rows, is_slippery=False)
    game.lake.reset(seed=0)
    game.lake.s = at
    return env, game


def test_the_way_over_the_ice_worked_by_hand() -> None:
    """From the third row only a step up leads on: the shortest way has eight steps there."""
    rows = ["SFFF", "FHHF", "FFHF", "HFHG"]
    env, game = lake(rows)
    advised = with_expert(env, config("FrozenLake"))
    advice = advised.expert.start()
    assert advice
    assert (advice.action, advice.distance) == ("right", 6)
    assert advice.thought == "holes (1,1) (2,1) (2,2) (0,3) (2,3); at (0,0); way right right right down down down"
    game.lake.s = 8
    advice = advised.expert.follow("down")
    assert advice
    assert (advice.action, advice.distance) == ("up", 8)
    game.lake.s = 5  # in a hole
    assert advised.expert.follow("down") is None


def test_a_seed_draws_its_map() -> None:
    env = cast(GymnasiumEnv, make_env(config("FrozenLake")))
    maps = []
    for seed in (3, 4, 3):
        env.reset(seed)
        maps.append(cast(FrozenLakeGame, env.game).lake.desc.tobytes())
    assert maps[0] == maps[2] != maps[1]


def test_no_map_of_a_training_seed_is_held_out() -> None:
    env = cast(GymnasiumEnv, make_env(config("FrozenLake")))
    drawn: list[set[bytes]] = []
    for first in (0, TRAINING_SEEDS):
        drawn.append(set())
        for seed in range(first, first + 300):
            env.reset(seed)
            drawn[-1].add(cast(FrozenLakeGame, env.game).lake.desc.tobytes())
    assert min(map(len, drawn)) > 100
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("kwargs", [{}, {"size": 7, "boxes": 2, "pulls": 6}], ids=str)
def test_every_room_of_sokoban_can_be_solved(kwargs: dict) -> None:
    cfg = config("Sokoban", **kwargs)
    env = with_expert(make_env(cfg), cfg)
    for seed in range(12):
        now, steps = env.reset(seed), 0
        distance = now.advice.distance if now.advice else None
        assert distance
        step = None
        while now.advice:
            step = env.step(now.advice.action)
            now, steps = step.observation, steps + 1
            assert step.terminated or (now.advice and now.advice.distance == distance - steps)
        assert step
        assert (step.success, steps) == (1.0, distance)


def test_a_box_in_a_corner_is_lost() -> None:
    cfg = config("Sokoban")
    env = make_env(cfg)
    advised = with_expert(env, cfg)
    advised.reset(0)
    game = cast(SokobanGame, cast(GymnasiumEnv, env).game)
    game.walls = frozenset(cell for cell in game.walls if 0 in cell or 5 in cell)
    game.targets, game.boxes, game.player = frozenset({(4, 4)}), frozenset({(1, 1)}), (3, 3)
    assert advised.expert.follow(None) is None
    game.boxes = frozenset({(2, 2)})
    assert advised.expert.follow(None)


@pytest.mark.parametrize(
    ("boxes", "then"),
    [
        ({(1, 2)}, ((1, 2), {(1, 3)})),  # pushed
        ({(1, 2), (1, 3)}, ((1, 1), {(1, 2), (1, 3)})),  # another box behind it
        (set(), ((1, 2), set())),
    ],
)
def test_what_a_move_does(boxes: set, then: tuple) -> None:
    assert played(frozenset({(1, 0)}), (1, 1), frozenset(boxes), (0, 1)) == (then[0], frozenset(then[1]))


def test_an_expert_of_another_game_is_refused() -> None:
    cfg = config("Sokoban")
    cfg.expert = "vlm_agents.experts.frozen_lake:FrozenLakeExpert"
    with pytest.raises(ConfigError, match=re.escape("isn't vlm_agents/FrozenLake-v0, which this expert is for")):
        with_expert(make_env(cfg), cfg)
