"""The expert of FrozenLake: a shortest way around the holes, and how it is found, in words.

It counts back from the goal, cell by cell, until it comes to where the player stands: each step of that can be seen
from the one before, which is what a small model learns to follow.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from vlm_agents.envs.frozen_lake import FrozenLakeGame
from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.errors import ConfigError
from vlm_agents.types import Advice

Cell = tuple[int, int]  # row, column
MOVES: tuple[Cell, ...] = ((0, -1), (1, 0), (0, 1), (-1, 0))  # of the actions 0 to 3
LIKED = (1, 2, 0, 3)  # actions, in the order in which those that come equally near are taken


class FrozenLakeExpert:
    """Its plan takes it that the ice isn't slippery; where it is, it plans anew from wherever it slid."""

    def __init__(self, env: GymnasiumEnv) -> None:
        if not isinstance(env.game, FrozenLakeGame):
            raise ConfigError(f"env.id={env.name} isn't vlm_agents/FrozenLake-v0, which this expert is for")
        self.game = env.game
        self.words = env.words

    def start(self) -> Advice | None:
        cells = {(row, column): letter for (row, column), letter in _letters(self.game.lake.desc)}
        self.holes = sorted(cell for cell, letter in cells.items() if letter == b"H")
        self.back = [sorted(cell for cell, letter in cells.items() if letter == b"G")]  # cells by steps to the goal
        seen = {*self.holes, *self.back[0]}
        while nearer := {_next(cell, move) for cell in self.back[-1] for move in MOVES} & cells.keys() - seen:
            self.back.append(sorted(nearer))
            seen |= nearer
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        here = divmod(int(self.game.lake.s), self.game.size)
        steps = next((steps for steps, cells in enumerate(self.back) if here in cells), 0)
        if not steps:
            return None
        number = next(number for number in LIKED if _next(here, MOVES[number]) in self.back[steps - 1])
        counted = "; ".join(map(_named, self.back[:steps]))
        then = _named([_next(here, MOVES[number])])
        thought = f"agent {_named([here])}, holes {_named(self.holes) or 'none'}; goal {counted}; next {then}"
        return Advice(thought, self.words[number], steps)


def _letters(desc: np.ndarray) -> Iterator[tuple[Cell, bytes]]:
    return (((int(row), int(column)), bytes(letter)) for (row, column), letter in np.ndenumerate(desc))


def _next(cell: Cell, move: Cell) -> Cell:
    return cell[0] + move[0], cell[1] + move[1]


def _named(cells: Iterable[Cell]) -> str:
    """`(2,1) (1,3)`: column and row, from 1 on."""
    return " ".join(f"({column + 1},{row + 1})" for row, column in cells)
