"""MiniGrid and BabyAI played by words: an adapter over any `MiniGrid-*` or `BabyAI-*` id.

The game, its rewards and its pictures are the minigrid package's; this only translates. It holds no expert.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import minigrid  # noqa: F401  (registers the ids)
import numpy as np
from minigrid.core.actions import Actions
from minigrid.core.grid import Grid
from minigrid.core.world_object import Door, WorldObj
from minigrid.envs.gotodoor import GoToDoorEnv
from minigrid.envs.gotoobject import GoToObjectEnv
from minigrid.envs.wfc import WFCEnv  # pyright: ignore[reportPrivateImportUsage]
from minigrid.minigrid_env import MiniGridEnv
from PIL import Image

from vlm_agents.config import MiniGridConfig
from vlm_agents.envs.base import out_of_turn, state_key
from vlm_agents.errors import EnvError, did_you_mean
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step

WORDS: dict[Actions, str] = {
    Actions.left: "turn left",
    Actions.right: "turn right",
    Actions.forward: "go forward",
    Actions.pickup: "pick up",
    Actions.drop: "drop",
    Actions.toggle: "toggle",
    Actions.done: "done",
}
FACING = ("right", "down", "left", "up")


class MiniGrid:
    """One MiniGrid game. `world` is minigrid's own env, which experts read and nobody else does."""

    def __init__(self, cfg: MiniGridConfig) -> None:
        self.cfg = cfg
        self.name = cfg.id
        self.world = _make(cfg.id)
        self.actions = {WORDS[action]: action for action in _useful_actions(self.world)}
        self.instructions = f"You are the red triangle in a grid. Actions: {', '.join(self.actions)}."
        self._words = tuple(self.actions)
        self._running = False
        self._key = ""

    @staticmethod
    def check(cfg: MiniGridConfig) -> None:
        """EnvError where minigrid has no such id, or can't make it."""
        _refuse_unknown(cfg.id)
        if "WFC" in cfg.id:  # only making it tells whether its patterns are there
            _make(cfg.id)

    def reset(self, seed: int) -> Observation:
        with contextlib.redirect_stdout(None):  # BabyAI prints each layout that it rejects
            self.world.reset(seed=seed)
        if self.cfg.max_steps is not None:
            self.world.max_steps = self.cfg.max_steps  # after the reset, since BabyAI sets its own there
        self._running = True
        return self._observe()

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        before = self._key
        legal = action in self.actions
        reward, terminated, truncated = self._play(self.actions[action]) if legal else self._pass()
        truncated = truncated and not terminated
        self._running = not (terminated or truncated)
        observation = self._observe()
        success, changed = terminated and reward > 0, self._key != before
        return Step(observation, reward, terminated, truncated, success, legal, changed)

    def close(self) -> None:
        self.world.close()
        self._running = False

    def _play(self, action: Actions) -> tuple[float, bool, bool]:
        _, reward, terminated, truncated, _ = self.world.step(action)
        return float(reward), bool(terminated), bool(truncated)

    def _pass(self) -> tuple[float, bool, bool]:
        """Time passes and nothing happens; no action of minigrid's means that in every id."""
        self.world.step_count += 1
        return 0.0, False, self.world.step_count >= self.world.max_steps

    def _observe(self) -> Observation:
        world = self.world
        held = world.carrying.encode() if world.carrying else None
        cells = [cell.encode() if cell else None for cell in world.grid.grid]
        self._key = state_key(cells, _pose(world), held)
        text = f"{world.mission}\n{describe(world)}" if self.cfg.describe else world.mission
        return Observation(text, (Picture(self._picture()),), self._words, self._key)

    def _picture(self) -> Image.Image:
        if self.cfg.view == "agent":
            return Image.fromarray(self.world.get_pov_render(self.cfg.tile_size))
        return Image.fromarray(_picture(self.world, self.cfg.tile_size))


class _Symbols(dict[str, Any]):
    """minigrid's own observation, the agent's view in symbols: made when a key of it is read, which is to be before the
    next step. Making it takes as long as the rest of a step, and hardly anything reads it."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> Any:
        self.update(self._make())
        return self[key]


def describe(world: MiniGridEnv) -> str:
    """What the agent sees, in words: pose, what it carries, and each object in view with its coordinates."""
    _, visible = world.gen_obs_grid()
    parts = [agent_words(world)]
    for index, thing in enumerate(world.grid.grid):
        at = (index % world.width, index // world.width)
        seen = world.relative_coords(*at)
        if thing and thing.type not in ("wall", "floor") and seen is not None and visible[seen]:
            parts.append(named(thing, at))
    return ", ".join(parts)


def agent_words(world: MiniGridEnv) -> str:
    """`agent (1,2) facing down, carrying the yellow key`."""
    x, y, facing = _pose(world)
    held = world.carrying
    return f"agent ({x},{y}) facing {FACING[facing]}" + (f", carrying the {held.color} {held.type}" if held else "")


def named(thing: WorldObj, at: tuple[int, int]) -> str:
    """`yellow door (3,1) locked`: one object in words; goals and lava go without their colour."""
    name = thing.type if thing.type in ("goal", "lava") else f"{thing.color} {thing.type}"
    return f"{name} ({at[0]},{at[1]})" + (f" {door_state(thing)}" if isinstance(thing, Door) else "")


def door_state(door: Door) -> str:
    return "open" if door.is_open else "locked" if door.is_locked else "closed"


def _pose(world: MiniGridEnv) -> tuple[int, int, int]:
    """Column, row and direction, as plain ints."""
    x, y = world.agent_pos
    return int(x), int(y), int(world.agent_dir)


def _picture(world: MiniGridEnv, tile_size: int) -> np.ndarray:
    """[H W 3] the whole grid from above without the highlight of the agent's view, of minigrid's own tiles."""
    x, y, facing = _pose(world)
    agent = y * world.width + x
    picture = np.empty((world.height, tile_size, world.width, tile_size, 3), dtype=np.uint8)
    for index, cell in enumerate(world.grid.grid):
        row, column = divmod(index, world.width)
        picture[row, :, column] = Grid.render_tile(cell, facing if index == agent else None, tile_size=tile_size)
    return picture.reshape(world.height * tile_size, world.width * tile_size, 3)


def _refuse_unknown(env_id: str) -> None:
    known = [name for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-"))]
    if env_id not in known:
        raise EnvError(
            f"env.id={env_id} is not an id of the minigrid package; other games are other choices of env=."
            f"{did_you_mean(env_id, known)} List the ids with: "
            'python -c "import minigrid, gymnasium; gymnasium.pprint_registry()"'
        )


def _make(env_id: str) -> MiniGridEnv:
    _refuse_unknown(env_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date", category=DeprecationWarning)
        try:
            world = gymnasium.make(env_id, disable_env_checker=True).unwrapped
            if isinstance(world, WFCEnv):
                world.config.wfc_kwargs  # noqa: B018 (else the first reset finds out what is missing)
        except (gymnasium.error.DependencyNotInstalled, OSError) as error:
            raise EnvError(
                f"env.id={env_id} needs two packages and a picture that minigrid's package on PyPI leaves out. Clone "
                "https://github.com/Farama-Foundation/Minigrid and run pip install -e 'Minigrid[wfc]', or choose "
                "another env.id"
            ) from error
    assert isinstance(world, MiniGridEnv)
    world.gen_obs = partial(_Symbols, world.gen_obs)
    return world


def _useful_actions(world: MiniGridEnv) -> list[Actions]:
    """`done` only where a mission is ended by it, and no action that the env doesn't know."""
    done_counts = isinstance(world, GoToDoorEnv | GoToObjectEnv)
    return [action for action in Actions if action in world.action_space and (done_counts or action != Actions.done)]
