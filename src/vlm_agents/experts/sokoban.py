"""The expert of Sokoban: a shortest way to have all boxes on targets, by breadth-first search, and it in words."""

from vlm_agents.envs.gymnasium_env import GymnasiumEnv
from vlm_agents.envs.sokoban import MOVES, Cell, SokobanGame, played, shifted
from vlm_agents.errors import ConfigError
from vlm_agents.types import Advice

State = tuple[Cell, frozenset[Cell]]  # the player, the boxes


class SokobanExpert:
    """None where no way is left. It searches once an episode, and again where the play has left its way."""

    def __init__(self, env: GymnasiumEnv) -> None:
        if not isinstance(env.game, SokobanGame):
            raise ConfigError(f"env.id={env.name} isn't vlm_agents/Sokoban-v0, which this expert is for")
        self.game = env.game
        self.words = env.words

    def start(self) -> Advice | None:
        self.known: dict[State, list[int]] = {}
        return self.follow(None)

    def follow(self, action: str | None) -> Advice | None:
        game = self.game
        state = (game.player, game.boxes)
        if state not in self.known:
            self._plan(state)
        way = self.known[state]
        if not way:
            return None
        boxes, targets = (" ".join(map(named, sorted(cells))) for cells in (game.boxes, game.targets))
        words = " ".join(self.words[number] for number in way)
        thought = f"me {named(game.player)}, box {boxes}, target {targets}; way {words}"
        return Advice(thought, self.words[way[0]], len(way))

    def _plan(self, start: State) -> None:
        """Make known the way from `start`, and from each state on it; empty where there is none."""
        game = self.game
        came: dict[State, tuple[State, int]] = {}
        frontier, seen = [start], {start}
        for state in frontier:  # grows while it is read: a queue
            if state[1] == game.targets:
                way: list[int] = []
                while state != start:
                    state, number = came[state]
                    way = [number, *way]
                    self.known[state] = way
                return
            for number, move in enumerate(MOVES):
                then = played(game.walls, *state, move)
                if then not in seen and not self._stuck(then[1]):
                    seen.add(then)
                    came[then] = (state, number)
                    frontier.append(then)
        self.known[start] = []

    def _stuck(self, boxes: frozenset[Cell]) -> bool:
        """Is a box that is on no target in a corner of walls?"""
        walls = self.game.walls
        return any(
            any(shifted(box, MOVES[n]) in walls and shifted(box, MOVES[(n + 1) % 4]) in walls for n in range(4))
            for box in boxes - self.game.targets
        )


def named(cell: Cell) -> str:
    return f"({cell[1]},{cell[0]})"
