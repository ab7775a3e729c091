"""Echo: a picture shows a colour, its name is the answer. A real Gymnasium env, and its adapter to words.

Solvable in seconds, so it is the test double of the harder games. Nothing in it depends on what was answered before.
"""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image

from vlm_agents.config import EchoConfig
from vlm_agents.envs.base import out_of_turn, state_key
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 0, 0),
    "green": (0, 150, 0),
    "blue": (0, 0, 220),
    "yellow": (255, 255, 0),
    "purple": (140, 0, 180),
    "orange": (255, 120, 0),
    "cyan": (0, 220, 220),
    "white": (255, 255, 255),
}
NAMES = tuple(COLORS)
OVER = (0, 0, 0)  # the picture after the last turn
SIDE = 56


class EchoGame(gymnasium.Env[np.ndarray, Any]):
    """`vlm_agents/Echo-v0`: one of the first `colors` colours a turn; naming it earns 1/turns. Ends after `turns`.

    An action outside the space, None included, names no colour. `info["success"]`: all turns were right.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 (Gymnasium reads it off the class)

    def __init__(self, colors: int = 4, turns: int = 3, render_mode: str | None = None) -> None:
        self.colors = colors
        self.turns = turns
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(colors)
        self.observation_space = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.answers: tuple[int, ...] = ()
        self.turn = 0
        self.right = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        colors = self.np_random.integers(self.colors, size=self.turns)
        self.answers = tuple(int(color) for color in colors)
        self.turn = self.right = 0
        return self.render(), {"success": False}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        right = action == self.answers[self.turn]
        self.right += bool(right)
        self.turn += 1
        over = self.turn == self.turns
        return self.render(), float(right) / self.turns, over, False, {"success": self.right == self.turns}

    def render(self) -> np.ndarray:
        """[56 56 3] the colour to be named now."""
        color = COLORS[NAMES[self.answers[self.turn]]] if self.turn < self.turns else OVER
        return np.full((SIDE, SIDE, 3), color, dtype=np.uint8)


class EchoEnv:
    """Echo played by words."""

    def __init__(self, cfg: EchoConfig) -> None:
        self.name = cfg.id
        self.max_steps = cfg.max_steps
        game = gymnasium.make(cfg.id, colors=cfg.colors, turns=cfg.turns, disable_env_checker=True).unwrapped
        assert isinstance(game, EchoGame)
        self.game = game
        self.words = NAMES[: cfg.colors]
        self.instructions = f"You see one colour a turn. Name it. Actions: {', '.join(self.words)}."
        self._running = False

    def reset(self, seed: int) -> Observation:
        pixels, _ = self.game.reset(seed=seed)
        self._running = True
        return replace(self._observe(pixels), tags={"first": self.words[self.game.answers[0]]})

    def step(self, action: str | None) -> Step:
        if not self._running:
            raise out_of_turn(self.name)
        legal = action in self.words
        pixels, reward, terminated, _, info = self.game.step(self.words.index(action) if legal else None)
        truncated = not terminated and self.game.turn == self.max_steps
        self._running = not (terminated or truncated)
        return Step(self._observe(pixels), reward, terminated, truncated, info["success"], legal, changed=True)

    def close(self) -> None:
        self.game.close()
        self._running = False

    def _observe(self, pixels: np.ndarray) -> Observation:
        turn, turns = self.game.turn, self.game.turns
        text = f"Turn {turn + 1} of {turns}. Name the colour." if turn < turns else "All turns are over."
        return Observation(
            text, (Picture(Image.fromarray(pixels)),), self.words, state_key(turn, self.game.answers[turn:])
        )
