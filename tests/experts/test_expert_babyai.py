"""minigrid's bot as the expert of BabyAI: it wins, recovers from moves that were not its own, and can give up."""

import re

import gymnasium
import numpy as np
import pytest

from vlm_agents.config import MiniGridConfig
from vlm_agents.envs import make_env
from vlm_agents.envs.base import Env
from vlm_agents.errors import ConfigError
from vlm_agents.experts import with_expert
from vlm_agents.experts.babyai import UNSOLVED

LEVELS = [
    f"BabyAI-{name}-v0"
    for name in ("GoToRedBall", "GoToLocal", "OpenDoor", "PickupLoc", "PutNextLocal", "UnlockLocal", "GoToSeqS5R2")
]
DEBUG = [f"BabyAI-{name}Debug-v0" for name in ("OpenDoor", "OpenRedBlueDoors", "PickupDist")]


def advised(env_id: str) -> Env:
    cfg = MiniGridConfig(id=env_id, tile_size=4)
    return with_expert(make_env(cfg), cfg)


def play(env: Env, seed: int, strays: float, rng: np.random.Generator) -> float:
    """Success of one episode in which a share of the moves is random among the harmless ones."""
    now = env.reset(seed)
    while True:
        assert now.advice
        wander = rng.random() < strays
        # toggling may open a box, which the bot doesn't forgive
        moves = ("turn left", "turn right", "go forward", "pick up", "drop", None)
        step = env.step(moves[rng.integers(len(moves))] if wander else now.advice.action)
        if step.terminated or step.truncated:
            return step.success
        now = step.observation


@pytest.mark.parametrize("strays", [0.0, 0.3])
@pytest.mark.parametrize("env_id", LEVELS)
def test_bot_wins(env_id: str, strays: float) -> None:
    env, rng = advised(env_id), np.random.default_rng(0)
    assert [play(env, seed, strays, rng) for seed in range(8)] == [1.0] * 8


@pytest.mark.parametrize("env_id", DEBUG)
def test_bot_wins_where_a_wrong_door_or_grip_ends_the_game(env_id: str) -> None:
    env, rng = advised(env_id), np.random.default_rng(0)
    assert [play(env, seed, 0.0, rng) for seed in range(8)] == [1.0] * 8


def test_every_level_that_is_refused_exists() -> None:
    assert set(gymnasium.registry) >= UNSOLVED


def test_thought_is_the_scene_then_the_mission() -> None:
    now = advised("BabyAI-GoToLocal-v0").reset(0)
    assert now.advice
    assert now.advice.distance is None
    seen, todo = now.advice.thought.split("; ")
    assert re.match(r"agent \(\d,\d\) facing (right|down|left|up), ", seen)
    assert re.fullmatch(rf"{now.text}, next \(\d,\d\)", todo)


def test_next_is_what_is_faced_after_the_advised_move() -> None:
    cfg = MiniGridConfig(id="BabyAI-GoToRedBall-v0", tile_size=4)
    game = make_env(cfg)
    env = with_expert(game, cfg)
    turned = 0
    for seed in range(5):
        now, over = env.reset(seed), False
        while not over:
            assert now.advice
            said = re.findall(r"next \((\d+),(\d+)\)", now.advice.thought)[0]
            before = tuple(game.world.front_pos)  # type: ignore[attr-defined]
            step = env.step(now.advice.action)
            turned += now.advice.action.startswith("turn")
            cell = game.world.front_pos if now.advice.action.startswith("turn") else before  # type: ignore[attr-defined]
            assert tuple(map(int, said)) == tuple(cell)
            over, now = step.terminated or step.truncated, step.observation
    assert turned


def test_bot_gives_up_on_an_opened_box_and_is_fresh_after_a_reset() -> None:
    cfg = MiniGridConfig(id="BabyAI-BlockedUnlockPickup-v0", tile_size=4)
    game = make_env(cfg)
    env = with_expert(game, cfg)
    env.reset(0)
    world = game.world  # type: ignore[attr-defined]
    box = next(thing for thing in world.grid.grid if thing and thing.type == "box")
    x, y = box.cur_pos
    world.agent_pos, world.agent_dir = (x - 1, y), 0  # put before the box
    assert env.step(None).observation.advice
    assert env.step("toggle").observation.advice is None
    assert env.step("turn left").observation.advice is None
    assert env.reset(0).advice


@pytest.mark.parametrize(
    "env_id", ["BabyAI-KeyInBox-v0", "BabyAI-PutNextS5N2Carrying-v0", "BabyAI-OpenDoorsOrderN2Debug-v0"]
)
def test_a_level_beyond_the_bot_is_refused(env_id: str) -> None:
    with pytest.raises(ConfigError, match=rf"{env_id} has no expert"):
        advised(env_id)
