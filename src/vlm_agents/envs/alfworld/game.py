"""A game of ALFWorld: its rules, texts, problem and task, read from a `game.tw-pddl`, or made here."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlm_agents.envs.alfworld import pddl
from vlm_agents.envs.alfworld.grammar import Grammar, read_grammar
from vlm_agents.errors import DataError, short

TASK = "traj_data.json"
KIND = re.compile(rb'"task_type"\s*:\s*"(\w+)"')
SOLVABLE = re.compile(rb'"solvable"\s*:\s*(\w+)')
MOST_BYTES = 1 << 24  # of a game's file; the largest of ALFWorld's have less than a tenth


@dataclass(frozen=True)
class Game:
    """`task` is `traj_data.json`: what kind of task it is, and its objects; it lies at `source`, if anywhere. `ident`
    names the game in records."""

    ident: str
    domain: str
    grammar: str
    problem: str
    task: Mapping[str, Any]
    source: Path | None = None

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
        return str(self.task["pddl_params"].get(parameter) or "").lower()


@contextmanager
def named_in_errors(game: Game) -> Iterator[None]:
    """DataError that says which game it is. Files may hold anything: whatever is wrong then, they are to blame."""
    place = f"the game {game.ident}" if game.source is None else str(game.source.parent)
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if game.source is None:
            raise
        told = f"{type(error).__name__}: {short(str(error))}"
        raise DataError(f"{place}: it can't be played ({told}): fetch it again") from error


def read_game(path: Path, root: Path) -> Game:
    """The game in a file, named by its folder below `root`, and its task. DataError where one is missing or broken."""
    game, task = _json(path), read_task(path)
    domain, grammar, problem = (game.get(name) for name in ("pddl_domain", "grammar", "pddl_problem"))
    if not (isinstance(domain, str) and isinstance(grammar, str) and isinstance(problem, str)):
        raise DataError(f"{path} is no game: it needs pddl_domain, grammar and pddl_problem. Fetch it again")
    return Game(path.parent.relative_to(root).as_posix(), domain, grammar, problem, task, path.with_name(TASK))


def read_task(path: Path) -> dict[str, Any]:
    """Of a game's file, what lies in `traj_data.json` beside it. DataError where that is missing or broken."""
    place = path.with_name(TASK)
    task = _json(place)
    parameters = task.get("pddl_params")
    if not (isinstance(parameters, dict) and parameters.get("object_target")):
        raise DataError(f"{place} is no task: it needs pddl_params with an object_target. Fetch it again")
    return task


class Mark(NamedTuple):
    """What kind of task a game is, and whether it can be won: ALFWorld plays no other."""

    kind: str
    solvable: bool


def marked(path: Path) -> Mark | None:
    """How a game's file is marked; None where it doesn't say. Read from the bytes: a whole split is looked through
    before the first game."""
    try:
        kind, game = KIND.search(_bytes(path.with_name(TASK))), SOLVABLE.search(_bytes(path))
    except DataError:
        return None
    return Mark(kind[1].decode(), game[1] == b"true") if kind and game else None


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES:,} bytes, no game of ALFWorld: fetch it again")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read {path} ({error.strerror}): fetch it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"can't read {path} ({short(str(error))}): fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is {short(found)}, no game: fetch it again")
    return found
