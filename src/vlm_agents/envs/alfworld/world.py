"""A game under way, by text: played by its commands, without TextWorld.

The texts and commands are those of TextWorld's PddlEnv with ALFWorld's names, to the letter; tests compare them.
"""

from collections import Counter

from vlm_agents.envs.alfworld import pddl
from vlm_agents.envs.alfworld.game import Game, named_in_errors
from vlm_agents.envs.alfworld.goals import progress
from vlm_agents.envs.alfworld.schematic import draw
from vlm_agents.envs.base import state_key
from vlm_agents.pictures import Picture

NOTHING = "Nothing happens."  # came of a command that can't be done
UNSEEN = ("checked", "examined")  # facts that looking makes, and that change nothing


class World:
    """A game under way. `text` is what was told last, `commands` what can be done now, sorted."""

    def __init__(self, game: Game) -> None:
        """DataError for a game that can't be played."""
        self.game = game
        with named_in_errors(game):
            self.names = demangled(game.rules)
            self.state = pddl.State(game.rules)
            self._beginning = frozenset(self.state.facts)
            self.text = game.texts.intro(self.state, self.names)
            self._look()

    def step(self, command: str) -> bool:
        """Play a command. Could it be done? DataError where the game has no words for it."""
        ground = self.does.get(command)
        if ground is None:
            self.text = NOTHING
            return False
        with named_in_errors(self.game):
            self.state.apply(ground)
            self.text = self.game.texts.feedback(ground, self.state, self.names)
            self._look()
        return True

    @property
    def rate(self) -> float:
        """The share of the goal's conditions that is met."""
        with named_in_errors(self.game):
            return progress(self.game, self.state).rate

    @property
    def key(self) -> str:
        changed = sorted(fact for fact in self.state.facts ^ self._beginning if fact[0] not in UNSEEN)
        return state_key(self.game.ident, changed)

    def picture(self, tile: int) -> Picture:
        return draw(self.state, self.names, tile)

    def _look(self) -> None:
        texts, found = self.game.texts, dict[str, pddl.Ground]()
        for ground in self.state.actions():
            found.setdefault(texts.command(ground, self.state, self.names), ground)
        self.does = dict(sorted(found.items()))
        self.commands = tuple(self.does)
        self.won = self.state.won()


def demangled(problem: pddl.Problem) -> dict[str, str]:
    """Names for people: `apple 2` for Apple_bar_2 of the game. Numbers go down in the order of the ids; what has no
    `_bar_` in it keeps its name, with a blank after it."""
    known = sorted({name for fact in problem.init for name in fact[1:]})
    kinds = {name: _kind(name) for name in known if "_bar_" in name}
    left = Counter(kinds.values())
    names = {}
    for name in known:
        if kind := kinds.get(name):
            names[name] = f"{kind} {left[kind]}"
            left[kind] -= 1
        else:
            names[name] = f"{name} "
    return names


def _kind(name: str) -> str:
    return name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "")
