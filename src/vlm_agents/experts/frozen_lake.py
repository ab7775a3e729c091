"""The expert of FrozenLake: a shortest way around the holes, and what it sees of the lake, in words."""

from vlm_agents.envs.frozen_lake import FrozenLakeGame
from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.errors import ConfigError
from vlm_agents.types import Advice

Cell = tuple[int, int]  # column, row
MOVES: tuple[Cell, ...] = ((-1, 0), (0, 1), (1, 0), (0, -1))  # of the actions 0 to 3


class FrozenLakeExpert:
    """Where several ways are shortest, the one that goes by the first action of these: down, right, left, up.

    Its plan takes it that the ice isn't slippery; where it is, it plans anew from wherever it slid.
    """

    def __init__(self, env: GymnasiumEnv) -> None:
        if not isinstance(env.game, FrozenLakeGame):
            raise ConfigError(f"env.id={env.name} isn't vlm_agents/FrozenLake-v0, which this expert is for")
        self.game = env.game
        self.words = env.words

    def start(self) -> Advice | None:
        lake = self.game.lake
        rows = [[bytes(letter).decode() for letter in row] for row in lake.desc]
        cells = {(x, y): letter for y, row in enumerate(rows) for x, letter in enumerate(row)}
        self.holes = [cell for cell, letter in cells.items() if letter == "H"]
        self.left = {cell: 0 for cell, letter in cells.items() if letter == "G"}  # steps to the goal
        frontier = list(self.left)
        for x, y in frontier:  # grows while it is read: a queue
            for dx, dy in MOVES:
                near = (x + dx, y + dy)
                if near in cells and near not in self.left and near not in self.holes:
                    self.left[near] = self.left[x, y] + 1
                    frontier.append(near)
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        row, column = divmod(int(self.game.lake.s), self.game.size)
        here = (column, row)
        if here not in self.left:
            return None
        way = list(self._way(here))
        holes = " ".join(map(named, self.holes)) or "none"
        words = " ".join(self.words[number] for number in way)
        return Advice(f"holes {holes}; at {named(here)}; way {words}", self.words[way[0]], len(way))

    def _way(self, here: Cell) -> list[int]:
        way = []
        while self.left[here]:
            for number in (1, 2, 0, 3):
                near = (here[0] + MOVES[number][0], here[1] + MOVES[number][1])
                if self.left.get(near) == self.left[here] - 1:
                    way.append(number)
                    here = near
                    break
        return way


def named(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"
