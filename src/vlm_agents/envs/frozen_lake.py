"""FrozenLake on a map that the seed draws: Gymnasium's own game, whose map is otherwise the same in every episode."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from vlm_agents.seeds import held_out, stable_hash


class FrozenLakeGame(gymnasium.Env[Any, Any]):
    """`vlm_agents/FrozenLake-v0`: from the upper left to the goal at the lower right, which ends it with 1; a hole ends
    it with 0. Every map has a way. `frozen`: the share of cells that aren't holes, before maps without a way are drawn
    anew. Training seeds and held-out seeds draw from different maps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium reads it off the class)

    def __init__(
        self, size: int = 4, frozen: float = 0.8, slippery: bool = False, render_mode: str | None = None
    ) -> None:
        self.size, self.frozen, self.slippery, self.render_mode = size, frozen, slippery, render_mode
        self.action_space = gymnasium.spaces.Discrete(4)  # left, down, right, up
        self.observation_space = gymnasium.spaces.Discrete(size * size)
        self.lake = self._lake(generate_random_map(size, frozen, 0))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            drawn, slips = (int(number) for number in self.np_random.integers(2**31, size=2))
            desc = generate_random_map(self.size, self.frozen, drawn)
            if is_held_out(desc) == (seed is not None and held_out(seed)):
                break
        self.lake = self._lake(desc)
        return self.lake.reset(seed=slips)

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        place, reward, terminated, truncated, info = self.lake.step(action)
        return place, float(reward), terminated, truncated, info

    def render(self) -> np.ndarray:
        """[H W 3] the lake from above, at most 512 pixels high and wide."""
        pixels = self.lake.render()
        assert isinstance(pixels, np.ndarray)
        return pixels

    def close(self) -> None:
        self.lake.close()

    def _lake(self, desc: list[str]) -> FrozenLakeEnv:
        return FrozenLakeEnv("rgb_array", desc, is_slippery=self.slippery)


def is_held_out(desc: list[str]) -> bool:
    """Is this map one of those that only held-out seeds draw? A fifth of all: there are few maps of 4x4 cells, so by
    seed alone most would be trained on."""
    return stable_hash(*desc) % 5 == 0
