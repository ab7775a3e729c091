"""NumberLine: a target, a current number, and steps of one between them."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vlm_agents.config import between
from vlm_agents.envs.base import check_action
from vlm_agents.envs.gym_cards import drawing


class NumberLineGame(gymnasium.Env[np.ndarray, Any]):
    """`vlm_agents/NumberLine-v0`: walk `current` to `target`, both 0 to `highest`.

    Reaching the target earns 1 and ends the episode; a step that doesn't come nearer costs 1. Truncated after
    `max_turns`, by default twice `highest`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012 (Gymnasium reads it off the class)
    words = ("-", "+")
    text = ""

    def __init__(self, highest: int = 5, max_turns: int | None = None, render_mode: str | None = None) -> None:
        between("highest", highest, 2, 99)  # more than two digits find no place in the picture
        self.highest = highest
        self.max_turns = 2 * highest if max_turns is None else max_turns
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(len(self.words))
        self.observation_space = drawing.SPACE
        self.target = self.current = self.turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.current, self.target = (int(n) for n in self.np_random.integers(self.highest + 1, size=2))
        if self.target == self.current:
            self.target = (self.target + 1) % self.highest
        self.turn = 0
        return self.render(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        check_action(self, action)
        before = abs(self.target - self.current)
        self.current = min(max(self.current + (1 if action else -1), 0), self.highest)
        self.turn += 1
        after = abs(self.target - self.current)
        over = after == 0
        reward = 1.0 if over else 0.0 if after < before else -1.0
        return self.render(), reward, over, not over and self.turn >= self.max_turns, self._info()

    def render(self) -> np.ndarray:
        return drawing.number_line(self.target, self.current)

    @property
    def rules(self) -> str:
        return "Number line: move Current to Target, one step a turn."

    @property
    def state(self) -> tuple[object, ...]:
        """What tells this situation from another one."""
        return self.target, self.current

    def describe(self) -> str:
        """The picture in words."""
        return f"Target: {self.target}\nCurrent: {self.current}"

    def _info(self) -> dict[str, Any]:
        success = self.current == self.target
        return {"target": self.target, "current": self.current, "success": success, "legal": True}
