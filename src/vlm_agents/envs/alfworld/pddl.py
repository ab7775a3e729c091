"""PDDL worlds that are played step by step: which actions there are now, what they do, whether the goal is met.

Of PDDL it knows what ALFWorld's domain is written in: types, `and`, `or`, `not`, `exists`, `forall`, `when`, `=`; costs
are left out. As in Fast Downward, an action that changes nothing, such as to go where one is, isn't there at all.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from vlm_agents.errors import DataError, short

TOKEN = re.compile(r"[()]|[^\s()]+")  # a comma belongs to its word, as in Fast Downward
COMMENT = re.compile(r";[^\n]*")
ROOT = "object"  # the type that all others are of


class Variable(NamedTuple):
    name: str  # with its question mark
    type: str


Term = str | Variable
Fact = tuple[str, ...]  # a predicate, and the objects that it holds of
Binding = Mapping[Variable, str]


class Atom(NamedTuple):
    predicate: str
    terms: tuple[Term, ...]


class Not(NamedTuple):
    part: "Condition"


class And(NamedTuple):
    parts: "tuple[Condition, ...]"


class Or(NamedTuple):
    parts: "tuple[Condition, ...]"


class Exists(NamedTuple):
    variables: tuple[Variable, ...]
    part: "Condition"


class ForAll(NamedTuple):
    variables: tuple[Variable, ...]
    part: "Condition"


Condition = Atom | Not | And | Or | Exists | ForAll


class Effect(NamedTuple):
    """What an action makes true, or untrue, of all `variables` for which the condition holds."""

    atom: Atom
    makes_true: bool
    variables: tuple[Variable, ...] = ()
    condition: Condition = And(())


@dataclass(frozen=True, slots=True)
class Action:
    name: str
    parameters: tuple[Variable, ...]
    precondition: Condition
    effects: tuple[Effect, ...]


class Ground(NamedTuple):
    """An action with an object for each of its parameters."""

    action: Action
    objects: tuple[str, ...]

    @property
    def binding(self) -> dict[Variable, str]:
        return dict(zip(self.action.parameters, self.objects, strict=True))


@dataclass(frozen=True, slots=True)
class Problem:
    """A domain and a problem in it. `objects`: the type of each, constants of the domain among them."""

    parents: Mapping[str, str]  # of each type
    actions: Mapping[str, Action]
    objects: Mapping[str, str]
    init: tuple[Fact, ...]
    goal: Condition

    def is_a(self, name: str, kind: str) -> bool:
        """Is the object of this type, or of one below it?"""
        own = self.objects[name]
        while own not in (kind, ROOT):
            own = self.parents.get(own, ROOT)
        return kind in (own, ROOT)


class State:
    """The facts of a problem after some actions. `denied` are those that an action made untrue."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.facts: set[Fact] = set()
        self.denied: set[Fact] = set()
        self._of: defaultdict[tuple[str, int, str], set[Fact]] = defaultdict(set)
        self._all: defaultdict[str, set[Fact]] = defaultdict(set)
        self._by_type: defaultdict[str, list[str]] = defaultdict(list)
        for fact in problem.init:
            self._add(fact)

    def won(self) -> bool:
        return self._holds(self.problem.goal, {})

    def actions(self) -> list[Ground]:
        """All that can be done and would do something, each once."""
        found: dict[Ground, None] = {}
        for action in self.problem.actions.values():
            for binding in self.solutions(action.precondition, {}):
                free = [one for one in action.parameters if one not in binding]
                for whole in self._choices(free, binding):
                    found[Ground(action, tuple(whole[one] for one in action.parameters))] = None
        return [one for one in found if self._does_something(one)]

    def apply(self, ground: Ground) -> None:
        """What makes true wins over what makes untrue, and all conditions are of the state before."""
        true, untrue = self._effects(ground)
        for fact in untrue - true:
            self._remove(fact)
            self.denied.add(fact)
        for fact in true:
            self._add(fact)
            self.denied.discard(fact)

    def with_predicate(self, predicate: str) -> set[Fact]:
        return self._all.get(predicate, set())

    def solutions(self, condition: Condition, binding: Binding) -> Iterator[Binding]:
        """The ways to choose objects for the condition's variables such that it holds; some may come twice."""
        if isinstance(condition, Atom):
            yield from self._matches(condition, binding)
        elif isinstance(condition, And):
            yield from self._together(condition.parts, binding)
        elif isinstance(condition, Or):
            yield from (found for part in condition.parts for found in self.solutions(part, binding))
        elif isinstance(condition, Exists):
            for found in self.solutions(condition.part, binding):
                yield {name: value for name, value in found.items() if name not in condition.variables}
        elif self._true(condition, binding):
            yield binding

    def _true(self, condition: Not | ForAll, binding: Binding) -> bool:
        if isinstance(condition, Not):
            return not self._holds(condition.part, binding)
        return all(self._holds(condition.part, inner) for inner in self._choices(condition.variables, binding))

    def _holds(self, condition: Condition, binding: Binding) -> bool:
        return any(True for _ in self.solutions(condition, binding))

    def _choices(self, variables: Sequence[Variable], binding: Binding) -> Iterator[Binding]:
        """All ways to choose objects for the variables, beside what is bound."""
        for chosen in product(*(self._objects(one.type) for one in variables)):
            yield {**binding, **dict(zip(variables, chosen, strict=True))}

    def _together(self, parts: Sequence[Condition], binding: Binding) -> Iterator[Binding]:
        """The atom that leaves least to choose comes first; what can choose nothing, such as `not`, last."""
        if not parts:
            yield binding
            return
        costs = [self._cost(part, binding) for part in parts]
        place = costs.index(min(costs))
        rest = (*parts[:place], *parts[place + 1 :])
        for found in self.solutions(parts[place], binding):
            yield from self._together(rest, found)

    def _cost(self, part: Condition, binding: Binding) -> float:
        if isinstance(part, Atom):
            return len(self._candidates(part, binding)) if part.predicate != "=" else 1e6
        return {And: 1e4, Exists: 1e5, Or: 1e7}.get(type(part), 1e8)

    def _candidates(self, atom: Atom, binding: Binding) -> set[Fact]:
        """Facts among which those that match are."""
        found = self._all.get(atom.predicate, set())
        for place, term in enumerate(atom.terms):
            name = term if isinstance(term, str) else binding.get(term)
            if name is not None:
                found = min(found, self._of.get((atom.predicate, place, name), set()), key=len)
        return found

    def _matches(self, atom: Atom, binding: Binding) -> Iterator[Binding]:
        if atom.predicate == "=":
            one, other = (term if isinstance(term, str) else binding[term] for term in atom.terms)
            if one == other:
                yield binding
            return
        for fact in self._candidates(atom, binding):
            chosen = dict(binding)
            for term, name in zip(atom.terms, fact[1:], strict=True):
                if isinstance(term, str):
                    if term != name:
                        break
                elif chosen.setdefault(term, name) != name or not self.problem.is_a(name, term.type):
                    break
            else:
                yield chosen

    def _effects(self, ground: Ground) -> tuple[set[Fact], set[Fact]]:
        binding, true, untrue = ground.binding, set[Fact](), set[Fact]()
        for effect in ground.action.effects:
            for inner in self._choices(effect.variables, binding):
                if self._holds(effect.condition, inner):
                    (true if effect.makes_true else untrue).add(_ground(effect.atom, inner))
        return true, untrue

    def _does_something(self, ground: Ground) -> bool:
        """Could it, in some state in which it can be done?"""
        effects, binding = ground.action.effects, ground.binding
        if any(effect.variables or effect.condition != And(()) for effect in effects):
            return True
        true, untrue = self._effects(ground)
        needed = {_ground(atom, binding) for atom in _needed(ground.action.precondition)}
        return not (true <= needed and untrue <= true)

    def _objects(self, kind: str) -> list[str]:
        if kind not in self._by_type:
            self._by_type[kind] = [name for name in self.problem.objects if self.problem.is_a(name, kind)]
        return self._by_type[kind]

    def _add(self, fact: Fact) -> None:
        self.facts.add(fact)
        self._all[fact[0]].add(fact)
        for place, name in enumerate(fact[1:]):
            self._of[fact[0], place, name].add(fact)

    def _remove(self, fact: Fact) -> None:
        self.facts.discard(fact)
        self._all[fact[0]].discard(fact)
        for place, name in enumerate(fact[1:]):
            self._of[fact[0], place, name].discard(fact)


def _ground(atom: Atom, binding: Binding) -> Fact:
    return (atom.predicate, *(term if isinstance(term, str) else binding[term] for term in atom.terms))


def _needed(condition: Condition) -> Iterator[Atom]:
    """The atoms without which it can't hold."""
    if isinstance(condition, Atom):
        yield condition
    elif isinstance(condition, And):
        for part in condition.parts:
            yield from _needed(part)


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_problem(domain: str, problem: str) -> Problem:
    """DataError for what is no PDDL, or has more in it than is known here."""
    try:
        return _reader(domain).problem(_tree(problem))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"its PDDL can't be read ({type(error).__name__}: {short(str(error))}): fetch it again"
        ) from error


@lru_cache(maxsize=16)
def _reader(domain: str) -> "_Reader":
    """All games have one of a few domains."""
    return _Reader(_tree(domain))


def _tree(text: str) -> list[Any]:
    """Lists of lists of words, in lower case."""
    stack: list[list[Any]] = [[]]
    for token in TOKEN.findall(COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise ValueError(f"{len(stack) - 1} brackets are never closed")
    (define,) = stack[0]
    return define


class _Reader:
    def __init__(self, domain: list[Any]) -> None:
        sections = {part[0]: part[1:] for part in domain[2:]}
        self._parents = dict(_typed(sections.get(":types", [])))
        self._constants = dict(_typed(sections.get(":constants", [])))
        self._actions = {part[1]: self._action(part[1:]) for part in domain[2:] if part[0] == ":action"}

    def problem(self, problem: list[Any]) -> Problem:
        sections = {part[0]: part[1:] for part in problem[2:]}
        objects = {**self._constants, **dict(_typed(sections[":objects"]))}
        init = tuple(tuple(fact) for fact in sections[":init"] if fact[0] != "=")
        for fact in init:
            for name in fact[1:]:
                objects[name]
        goal = self._condition(sections[":goal"][0], {})
        return Problem(self._parents, self._actions, objects, init, goal)

    def _action(self, part: list[Any]) -> Action:
        name, *fields = part
        named = dict(zip(fields[::2], fields[1::2], strict=True))
        parameters = tuple(Variable(*one) for one in _typed(named.get(":parameters", [])))
        known = {one.name: one for one in parameters}
        precondition = self._condition(named.get(":precondition", []), known)
        return Action(name, parameters, precondition, tuple(self._effects(named[":effect"], known)))

    def _condition(self, tree: list[Any], known: Mapping[str, Variable]) -> Condition:
        if not tree:
            return And(())
        head, *parts = tree
        if head in ("and", "or"):
            inner = tuple(self._condition(part, known) for part in parts)
            return And(inner) if head == "and" else Or(inner)
        if head == "not":
            return Not(self._condition(parts[0], known))
        if head in ("exists", "forall"):
            variables = tuple(Variable(*one) for one in _typed(parts[0]))
            part = self._condition(parts[1], {**known, **{one.name: one for one in variables}})
            return Exists(variables, part) if head == "exists" else ForAll(variables, part)
        return _atom(tree, known)

    def _effects(self, tree: list[Any], known: Mapping[str, Variable]) -> Iterator[Effect]:
        head, *parts = tree
        if head == "and":
            for part in parts:
                yield from self._effects(part, known)
        elif head == "when":
            condition = self._condition(parts[0], known)
            for effect in self._effects(parts[1], known):
                yield effect._replace(condition=And((condition, effect.condition)))
        elif head == "forall":
            variables = tuple(Variable(*one) for one in _typed(parts[0]))
            for effect in self._effects(parts[1], {**known, **{one.name: one for one in variables}}):
                yield effect._replace(variables=(*variables, *effect.variables))
        elif head == "not":
            yield Effect(_atom(parts[0], known), makes_true=False)
        elif head != "increase":
            yield Effect(_atom(tree, known), makes_true=True)


def _atom(tree: list[Any], known: Mapping[str, Variable]) -> Atom:
    return Atom(tree[0], tuple(known[name] if name.startswith("?") else name for name in tree[1:]))


def _typed(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and their types: `a b - kind c` is a and b of that kind, and c of any."""
    waiting: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "-":
            kind = next(rest)
            yield from ((name, kind) for name in waiting)
            waiting = []
        else:
            waiting.append(word)
    yield from ((name, ROOT) for name in waiting)
