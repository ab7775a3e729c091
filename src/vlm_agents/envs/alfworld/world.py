"""One game of ALFWorld, played by its commands: read from a `game.tw-pddl`, or made here, without TextWorld.

The texts and commands are those of TextWorld's PddlEnv with ALFWorld's names, to the letter; tests compare them.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_agents.envs.alfworld import pddl
from vlm_agents.envs.alfworld.grammar import Grammar, read_grammar
from vlm_agents.errors import DataError, short

NOTHING = "Nothing happens."  # came of a command that can't be done
MOST_BYTES = 1 << 24  # of a game's file; the largest of ALFWorld's have less than a tenth


@dataclass(frozen=True)
class Game:
    """`task` is `traj_data.json`: what kind of task it is, and its objects. `ident` names the game in records."""

    ident: str
    domain: str
    grammar: str
    problem: str
    task: Mapping[str, Any]

    @cached_property
    def rules(self) -> pddl.Problem:
        return pddl.read_problem(self.domain, self.problem)

    @cached_property
    def texts(self) -> Grammar:
        return read_grammar(self.grammar)

    @property
    def kind(self) -> str:
        return str(self.task.get("task_type", ""))

    def named(self, parameter: str) -> str:
        """A parameter of the task in lower case: object_target, parent_target, toggle_target."""
        return str(self.task.get("pddl_params", {}).get(parameter) or "").lower()


def read_game(path: Path, root: Path) -> Game:
    """The game in a file, named by its folder below `root`, and its task. DataError where one is missing or broken."""
    game, task = _json(path), read_task(path)
    domain, grammar, problem = (game.get(name) for name in ("pddl_domain", "grammar", "pddl_problem"))
    if not (isinstance(domain, str) and isinstance(grammar, str) and isinstance(problem, str)):
        raise DataError(f"{path} is no game: it needs pddl_domain, grammar and pddl_problem. Fetch it again")
    return Game(path.parent.relative_to(root).as_posix(), domain, grammar, problem, task)


def read_task(path: Path) -> dict[str, Any]:
    """Of a game's file, what lies in `traj_data.json` beside it. DataError where that is missing or broken."""
    return _json(path.with_name("traj_data.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES:,} bytes, no game of ALFWorld: fetch it again")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"can't read {path} ({short(str(error))}): fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is {short(found)}, no game: fetch it again")
    return found


class World:
    """A game under way. `text` is what was told last, `commands` what can be done now, sorted."""

    def __init__(self, game: Game) -> None:
        """DataError for a game that can't be played."""
        self.game, self.names = game, demangled(game.rules)
        self.state = pddl.State(game.rules)
        self.beginning = frozenset(self.state.facts)
        self.text = game.texts.intro(self.state, self.names)
        self._look()

    def step(self, command: str) -> bool:
        """Play a command. Could it be done?"""
        ground = self.does.get(command)
        if ground is None:
            self.text = NOTHING
            return False
        self.state.apply(ground)
        self.text = self.game.texts.feedback(ground, self.state, self.names)
        self._look()
        return True

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
