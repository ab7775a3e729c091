"""The expert of FrozenLake: a shortest way around the holes, told in words after what there is to be seen."""

from collections.abc import Iterator

import numpy as np

from vlm_agents.envs.frozen_lake import FrozenLakeGame
from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.errors import ConfigError
from vlm_agents.types import Advice

Cell = tuple[int, int]  # column, row
MOVES: tuple[Cell, ...] = ((-1, 0), (0, 1), (1, 0), (0, -1))  # of the actions 0 to 3
LIKED = (1, 2, 0, 3)  # actions, in the order in which those that come equally near are taken


class FrozenLakeExpert:
    """Its plan takes it that the ice isn't slippery; where it is, it plans anew from wherever it slid."""

    def __init__(self, env: GymnasiumEnv) -> None:
        if not isinstance(env.game, FrozenLakeGame):
            raise ConfigError(f"env.id={env.name} isn't vlm_agents/FrozenLake-v0, which this expert is for")
        self.game = env.game
        self.words = env.words

    def start(self) -> Advice | None:
        cells = {(x, y): letter for (y, x), letter in _letters(self.game.lake.desc)}
        self.holes = [cell for cell, letter in cells.items() if letter == b"H"]
        self.left = {cell: 0 for cell, letter in cells.items() if letter == b"G"}  # steps to the goal
        queue = list(self.left)
        for cell in queue:
            for near in (_next(cell, move) for move in MOVES):
                if near in cells and near not in self.left and near not in self.holes:
                    self.left[near] = self.left[cell] + 1
                    queue.append(near)
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        row, column = divmod(int(self.game.lake.s), self.game.size)
        here = column, row
        way = list(self._way(here))
        if not way:
            return None
        holes = " ".join(map(_named, self.holes)) or "none"
        words = [self.words[number] for number in way]
        return Advice(f"holes {holes}; at {_named(here)}; way {' '.join(words)}", words[0], len(way))

    def _way(self, here: Cell) -> Iterator[int]:
        """The actions from here to the goal."""
        while self.left.get(here):
            number = next(n for n in LIKED if self.left.get(_next(here, MOVES[n])) == self.left[here] - 1)
            yield number
            here = _next(here, MOVES[number])


def _letters(desc: np.ndarray) -> Iterator[tuple[Cell, bytes]]:
    return (((int(row), int(column)), bytes(letter)) for (row, column), letter in np.ndenumerate(desc))


def _next(cell: Cell, move: Cell) -> Cell:
    return cell[0] + move[0], cell[1] + move[1]


def _named(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"
