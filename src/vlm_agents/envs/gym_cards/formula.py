"""Formulas of numbers, + - * / and brackets: what they are worth, and which hands can make a target.

Exact: everything is a Fraction. Nothing here runs Python's eval, not even `evaluate_as_python`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, permutations, product
from typing import Any

BLANK = " "  # what stands in a formula for a number that wasn't in the hand

# ---- what a formula is worth -----------------------------------------------------------------------------------------
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
}
PYTHON_TOKEN = re.compile(r"\d+|\*\*|//|[-+*/()]")
LONGEST_POWER = 4096  # bits: no power beyond that comes back to a target


def evaluate(symbols: Sequence[str]) -> Fraction | None:
    """The value of a formula whose symbols are one token each; None where it has none. Blanks say nothing."""
    return _value([symbol for symbol in symbols if symbol != BLANK], Fraction)


def evaluate_as_python(symbols: Sequence[str]) -> complex | None:
    """The value of the symbols written in a row, as Python reads it: floats, `**`, `//`, and "2", "4" are 24."""
    return _value(PYTHON_TOKEN.findall("".join(symbols)), int)


def _value(tokens: Sequence[str], number: Callable[[str], Any]) -> Any:
    reader = _Reader(tokens, number)
    try:
        value = reader.sum()
    except (ValueError, ArithmeticError, TypeError):  # no formula, no value, or nothing that complex numbers can do
        return None
    return value if reader.at_end else None


class _Reader:
    """Recursive descent with Python's precedence."""

    def __init__(self, tokens: Sequence[str], number: Callable[[str], Any]) -> None:
        self._tokens = [*tokens, ""]
        self._at = 0
        self._number = number

    @property
    def at_end(self) -> bool:
        return self._at == len(self._tokens) - 1

    def sum(self) -> Any:
        value = self._product()
        while sign := self._take("+", "-"):
            value = OPERATIONS[sign](value, self._product())
        return value

    def _product(self) -> Any:
        value = self._signed()
        while sign := self._take("*", "/", "//"):
            value = OPERATIONS[sign](value, self._signed())
        return value

    def _signed(self) -> Any:
        if sign := self._take("+", "-"):
            value = self._signed()
            return -value if sign == "-" else value
        base = self._atom()
        return _power(base, self._signed()) if self._take("**") else base

    def _atom(self) -> Any:
        if self._take("("):
            value = self.sum()
            if not self._take(")"):
                raise ValueError("a bracket is left open")
            return value
        token = self._tokens[self._at]
        value = self._number(token)  # ValueError for a sign, a bracket or the end
        self._at += 1
        return value

    def _take(self, *wanted: str) -> str:
        """The next token if it is one of these, and go on; else an empty string."""
        token = self._tokens[self._at]
        if token not in wanted:
            return ""
        self._at += 1
        return token


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and base.bit_length() * exponent > LONGEST_POWER:
        raise OverflowError("9**9**9 takes longer than anyone waits")
    return base**exponent


# ---- what a hand can make --------------------------------------------------------------------------------------------
def solvable(numbers: Sequence[int], target: int, plain: bool = False) -> bool:
    """Can a formula that uses each of `numbers` once be worth `target` (at least 1)?

    `plain`: with + and * alone, and no brackets.
    """
    return (_plainly if plain else _anyhow)(tuple(sorted(numbers)), target)


@cache
def _plainly(numbers: tuple[int, ...], target: int) -> bool:
    for order in permutations(map(str, numbers)):
        for signs in product("+*", repeat=len(numbers) - 1):
            symbols = [word for pair in zip(order, (*signs, ""), strict=True) for word in pair][:-1]
            if evaluate(symbols) == target:
                return True
    return False


@cache
def _anyhow(numbers: tuple[int, ...], target: int) -> bool:
    if len(numbers) == 1:
        return numbers[0] == target
    for one, other in _splits(numbers):
        reachable = _values(other)
        for a in _values(one):
            # a + b, a - b, b - a, and a * b, a / b, b / a, each solved for b
            wanted = {target - a, a - target, target + a}
            wanted |= {target / a, a / target, a * target} if a else set()
            if not reachable.isdisjoint(wanted):
                return True
    return False


@cache
def _values(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """The value of every formula that uses each of these once."""
    if len(numbers) == 1:
        return frozenset({Fraction(numbers[0])})
    values: set[Fraction] = set()
    for one, other in _splits(numbers):
        for a, b in product(_values(one), _values(other)):
            values |= {a + b, a - b, b - a, a * b}
            values |= {a / b} if b else set()
            values |= {b / a} if a else set()
    return frozenset(values)


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to part a sorted hand in two, neither empty, both sorted; the larger part second."""
    places = range(len(numbers))
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(places, size):
            yield tuple(numbers[i] for i in chosen), tuple(numbers[i] for i in places if i not in chosen)
