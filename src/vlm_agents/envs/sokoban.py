"""Sokoban in small rooms: push every box onto a target. Rooms are made by playing backwards, so that all can be solved.

Written here, with a drawing of its own. A box in a corner is lost: no move is ever taken back.
"""

from typing import Any

import gymnasium
import numpy as np

Cell = tuple[int, int]  # row, column
MOVES: tuple[Cell, ...] = ((0, -1), (1, 0), (0, 1), (-1, 0))  # left, down, right, up
TILE = 28
COLORS = {
    "wall": (70, 70, 80),
    "floor": (235, 230, 215),
    "target": (220, 90, 90),
    "box": (190, 130, 50),
    "box on target": (80, 160, 80),
    "player": (50, 90, 200),
}


def shifted(cell: Cell, move: Cell) -> Cell:
    return cell[0] + move[0], cell[1] + move[1]


class SokobanGame(gymnasium.Env[Any, Any]):
    """`vlm_agents/Sokoban-v0`: a room of `size` by `size` cells with walls around it, and `boxes` in it.

    A step costs 0.1, a box that comes onto a target earns 1, one that leaves it costs 1, and the last one ends the
    episode with 10 more. A move against what can't be moved does nothing. `info["state"]` is all of it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium reads it off the class)

    def __init__(self, size: int = 6, boxes: int = 1, pulls: int = 12, render_mode: str | None = None) -> None:
        if size < 5 or not 1 <= boxes <= (size - 2) ** 2 // 4:
            raise ValueError(f"no room for {boxes} boxes in {size} by {size} cells with walls around")
        self.size, self.count, self.pulls, self.render_mode = size, boxes, pulls, render_mode
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self.observation_space = gymnasium.spaces.Box(0, 255, (size * TILE, size * TILE, 3), np.uint8)
        self.walls: frozenset[Cell] = frozenset()
        self.targets: frozenset[Cell] = frozenset()
        self.boxes: frozenset[Cell] = frozenset()
        self.player: Cell = (1, 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            self._draw_room()
            if not self.boxes & self.targets:
                return self.render(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        home = len(self.boxes & self.targets)
        self.player, self.boxes = played(self.walls, self.player, self.boxes, MOVES[int(action)])
        gained = len(self.boxes & self.targets) - home
        solved = self.boxes == self.targets
        return self.render(), gained - 0.1 + 10 * solved, solved, False, self._info()

    def render(self) -> np.ndarray:
        """[size*28 size*28 3] the room from above."""
        picture = np.empty((self.size * TILE, self.size * TILE, 3), np.uint8)
        for row, column in np.ndindex(self.size, self.size):
            cell = (int(row), int(column))
            tile = picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            tile[:] = COLORS["wall" if cell in self.walls else "floor"]
            if cell in self.targets:
                tile[4:-4, 4:-4] = COLORS["target"]
                tile[8:-8, 8:-8] = COLORS["floor"]
            if cell in self.boxes:
                tile[6:-6, 6:-6] = COLORS["box on target" if cell in self.targets else "box"]
            if cell == self.player:
                across, down = np.ogrid[:TILE, :TILE]
                tile[(across - TILE / 2) ** 2 + (down - TILE / 2) ** 2 < (TILE / 3) ** 2] = COLORS["player"]
        return picture

    def _info(self) -> dict[str, Any]:
        return {"state": repr((sorted(self.walls), sorted(self.targets), sorted(self.boxes), self.player))}

    def _draw_room(self) -> None:
        """Walls, the boxes on their targets, and the player; then boxes are pulled away from the targets."""
        rng, inner = self.np_random, range(1, self.size - 1)
        border = {(row, column) for row in range(self.size) for column in range(self.size)} - {
            (row, column) for row in inner for column in inner
        }
        free = [(row, column) for row in inner for column in inner]
        order = [free[index] for index in rng.permutation(len(free))]
        blocks = rng.integers(len(free) // 8 + 1)
        self.walls = frozenset(border | set(order[:blocks]))
        self.targets = self.boxes = frozenset(order[blocks : blocks + self.count])
        self.player = order[blocks + self.count]
        pulls = 0
        for _ in range(20 * self.pulls):
            move = MOVES[rng.integers(len(MOVES))]
            to, behind = shifted(self.player, move), shifted(self.player, (-move[0], -move[1]))
            if to in self.walls or to in self.boxes:
                continue
            if behind in self.boxes:  # undoes a push by `move` reversed
                self.boxes = self.boxes - {behind} | {self.player}
                pulls += 1
            self.player = to
            if pulls >= self.pulls:
                break


def played(walls: frozenset[Cell], player: Cell, boxes: frozenset[Cell], move: Cell) -> tuple[Cell, frozenset[Cell]]:
    """Player and boxes after a move."""
    to = shifted(player, move)
    if to in boxes:
        beyond = shifted(to, move)
        if beyond in walls or beyond in boxes:
            return player, boxes
        return to, boxes - {to} | {beyond}
    return (player, boxes) if to in walls else (to, boxes)
