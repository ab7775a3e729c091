"""The texts of a game: TextWorld's grammar of feedback and commands, as game files of ALFWorld hold it.

A symbol has productions, the first whose condition holds is taken. In a text, `#symbol#` stands for a symbol,
`{o.name}` for the name of what `o` is, `[{o.name | holds(a:agent, o:object)}]` for a list of all for which the query
holds. Nothing in it is run: of Python's expressions it knows names, texts, `+` and `or`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_agents.envs.alfworld.pddl import Ground, State
from vlm_agents.errors import DataError, short

BLOCK = re.compile(r'"""(.*?)"""', re.DOTALL)
ACTION = re.compile(r"action\s+(\w+)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
FIELD = re.compile(r'(template|feedback)\s*::\s*"((?:[^"\\]|\\.)*)"')
PIECE = re.compile(r"#(?P<symbol>[^#]+)#|\[\{(?P<list>[^{}]*)\}\]|\{(?P<one>[^{}]*)\}")
QUERY = re.compile(r"(\w+)\(([^)]*)\)")
NOT = "not_"  # begins the name of a fact that an action made untrue

Names = Mapping[str, str]  # of each object, for people
Bound = Mapping[str, str]  # a variable's name without its question mark, and the object


class Production(NamedTuple):
    text: str
    condition: str


class Command(NamedTuple):
    """How an action is written, and what is told when it was done."""

    template: str
    feedback: str


@dataclass(frozen=True, slots=True)
class Grammar:
    symbols: Mapping[str, tuple[Production, ...]]
    commands: Mapping[str, Command]  # by the action's name in lower case

    def intro(self, state: State, names: Names) -> str:
        return self._written("#intro#", state, names, {})

    def command(self, ground: Ground, state: State, names: Names) -> str:
        return self._written(self._command(ground).template, state, names, _bound(ground))

    def feedback(self, ground: Ground, state: State, names: Names) -> str:
        return self._written(self._command(ground).feedback, state, names, _bound(ground))

    def _command(self, ground: Ground) -> Command:
        if ground.action.name not in self.commands:
            raise DataError(f"its grammar has no action {ground.action.name}, and its domain has: fetch the game again")
        return self.commands[ground.action.name]

    def _written(self, text: str, state: State, names: Names, bound: Bound) -> str:
        def piece(match: re.Match[str]) -> str:
            if match["symbol"] is not None:
                return self._written(self._production(match["symbol"], state, bound), state, names, bound)
            expression, _, query = (match["one"] if match["list"] is None else match["list"]).partition("|")
            found = [self._said(expression.strip(), state, names, one) for one in _found(query, state, bound)]
            if match["list"] is None:
                return "".join(found)
            if len(found) < 2:
                return "".join(found) if found else self._written("#list_empty#", state, names, bound)
            between, last = (self._written(f"#list_{name}separator#", state, names, bound) for name in ("", "last_"))
            return between.join(found[:-1]) + last + found[-1]

        return PIECE.sub(piece, text)

    def _said(self, expression: str, state: State, names: Names, bound: Bound) -> str:
        if expression.startswith("#"):
            return self._written(expression, state, names, bound)
        for choice in re.split(r"\s+or\s+", expression):
            if said := "".join(_value(part.strip(), names, bound) for part in choice.split("+")):
                return said
        return ""

    def _production(self, symbol: str, state: State, bound: Bound) -> str:
        for one in self.symbols.get(symbol, ()):
            if not one.condition or any(True for _ in _found(one.condition, state, bound)):
                return one.text
        raise DataError(f"its grammar says nothing for {short(symbol)}: fetch the game again")


def _bound(ground: Ground) -> Bound:
    return {one.name.removeprefix("?"): name for one, name in ground.binding.items()}


def _value(part: str, names: Names, bound: Bound) -> str:
    if part[:1] in "'\"" and part[:1] == part[-1:] and len(part) > 1:
        return part[1:-1]
    variable, _, field = part.partition(".")
    if variable not in bound:
        raise DataError(f"its grammar names {short(part)}, which isn't known there: fetch the game again")
    name = bound[variable]
    return {"": names[name], "name": names[name], "id": name, "indefinite": "a", "definite": "the"}[field]


def _found(query: str, state: State, bound: Bound) -> Iterator[Bound]:
    """The ways in which the query holds, by the facts' order; different variables are different objects."""
    atoms = [(name, [one.partition(":")[::2] for one in terms.split(",")]) for name, terms in QUERY.findall(query)]

    def holds(place: int, chosen: dict[str, str]) -> Iterator[dict[str, str]]:
        if place == len(atoms):
            yield chosen
            return
        name, terms = atoms[place]
        denied = name.startswith(NOT)
        facts = (
            [fact for fact in state.denied if fact[0] == name.removeprefix(NOT)]
            if denied
            else state.with_predicate(name)
        )
        for fact in sorted(facts):
            then = dict(chosen)
            for (variable, kind), value in zip(terms, fact[1:], strict=True):
                variable = variable.strip()
                if variable in then:
                    if then[variable] != value:
                        break
                elif value in then.values() or not state.problem.is_a(value, kind.strip()):
                    break
                else:
                    then[variable] = value
            else:
                yield from holds(place + 1, then)

    yield from holds(0, dict(bound))


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_grammar(text: str) -> Grammar:
    """DataError for what is no such grammar."""
    symbols: dict[str, tuple[Production, ...]] = {}
    for block in BLOCK.findall(text):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
        try:
            rules = json.loads("\n".join(lines))
            symbols |= {name: tuple(map(_production, choices)) for name, choices in rules.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"its grammar can't be read ({short(str(error))}): fetch the game again") from error
    commands = {}
    for name, body in ACTION.findall(BLOCK.sub("", text)):
        fields = dict(FIELD.findall(body))
        commands[name.lower()] = Command(fields.get("template", ""), fields.get("feedback", ""))
    if "intro" not in symbols or not commands:
        raise DataError("its grammar has no intro or no actions: fetch the game again")
    return Grammar(symbols, commands)


def _production(rule: dict[str, Any]) -> Production:
    """TextWorld drops what is blank at a text's beginning."""
    return Production(str(rule["rhs"]).replace("\\n", "\n").lstrip(), str(rule.get("condition", "")))
