"""An env of one's own: `python -m vlm_agents stage=collect env=custom env.factory=examples.own_env:make ...`."""

import numpy as np
from PIL import Image

from vlm_agents.envs.base import out_of_turn
from vlm_agents.pictures import Picture
from vlm_agents.types import Observation, Step

WORDS = ("left", "right")
CELL = 28


class Corridor:
    """Walk along a corridor of `length` cells to the green one, within `max_steps` turns."""

    name = "Corridor"  # of the record; held-out seeds go by it
    instructions = f"You are the red cell. Walk to the green one. Actions: {', '.join(WORDS)}."

    def __init__(self, length: int, max_steps: int) -> None:
        self.length = length
        self.max_steps = max_steps
        self.running = False

    def reset(self, seed: int) -> Observation:
        """Everything comes from `seed`, so that an episode can be played again."""
        drawn = np.random.default_rng(seed).choice(self.length, size=2, replace=False)
        self.place, self.goal = (int(cell) for cell in drawn)
        self.turn, self.running = 0, True
        return self.observe()

    def step(self, action: str | None) -> Step:
        """`None`, or a word that isn't legal, lets the turn pass."""
        if not self.running:
            raise out_of_turn(self.name)
        before, legal = self.place, action in WORDS
        if legal:
            self.place = min(max(self.place + (1 if action == "right" else -1), 0), self.length - 1)
        self.turn += 1
        success = self.place == self.goal
        truncated = not success and self.turn == self.max_steps
        self.running = not (success or truncated)
        return Step(self.observe(), float(success), success, truncated, success, legal, changed=self.place != before)

    def close(self) -> None:
        self.running = False

    def observe(self) -> Observation:
        pixels = np.full((CELL, CELL * self.length, 3), 255, np.uint8)
        for cell, color in ((self.goal, (0, 160, 0)), (self.place, (220, 0, 0))):
            pixels[:, CELL * cell : CELL * (cell + 1)] = color
        return Observation("", (Picture(Image.fromarray(pixels)),), WORDS, state_key=str(self.place))


def make(length: int = 6, max_steps: int = 12) -> Corridor:
    return Corridor(length, max_steps)
