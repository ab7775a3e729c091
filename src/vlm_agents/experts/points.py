"""Formulas that make a target of some numbers, each used exactly once: solved and completed, in exact fractions.

A formula is a tuple of symbols, `("8", "/", "(", "3", "-", ...)`. It is read from left to right as a stack of frames,
one for each open bracket, so that any sound beginning can be completed, whoever wrote it. It knows nothing of
cards or thoughts.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache, lru_cache
from itertools import combinations
from typing import NamedTuple

Formula = tuple[str, ...]
Numbers = tuple[int, ...]  # in falling order
Exact = int | Fraction  # whole values are ints, which are much faster
Found = tuple[int, Formula]  # cost and symbols

# What makes a formula the worse one, the worst first. There are fewer than ten of each, so that one pair of brackets
# weighs more than any number of fractions, and so on: the cheapest formula is one of the shortest.
BRACKET_PAIR, FRACTION = 10_000, 1_000
WEIGHT = {"+": 0, "-": 1, "*": 10, "/": 100}
BRACKETS = frozenset("()")
SYMBOLS = BRACKETS.union(WEIGHT)


def complete(
    so_far: Iterable[str], numbers: Iterable[int], target: int, operators: Iterable[str], max_symbols: int
) -> Formula | None:
    """The symbols that complete `so_far` to `target` within `max_symbols` in all; () where nothing is missing.

    `operators` name those of + - * / ( ) that may be used. The order of the numbers makes no difference. The symbols
    are those of the canonical formula where it begins so, else as few as possible. None where nothing completes it but
    a sign before an operand: signs are read, as in `- 3 + 8`, and never written.
    """
    so_far, numbers, allowed = tuple(so_far), _falling(numbers), SYMBOLS.intersection(operators)
    canonical = _solve(numbers, target, allowed)
    if canonical is None:
        return None
    canonical_so_far = canonical[: len(so_far)] == so_far
    rest = canonical[len(so_far) :] if canonical_so_far else _complete(so_far, numbers, target, allowed)
    return rest if rest is not None and len(so_far) + len(rest) <= max_symbols else None


def _falling(numbers: Iterable[int]) -> Numbers:
    return tuple(sorted(numbers, reverse=True))


@cache
def _solve(numbers: Numbers, target: int, operators: frozenset[str]) -> Formula | None:
    """The canonical formula: few brackets come first, then few fractions on the way, then few / * and -, then large
    numbers on the left."""
    return _complete((), numbers, target, operators)


@lru_cache(maxsize=10_000)
def _complete(so_far: Formula, numbers: Numbers, target: int, operators: frozenset[str]) -> Formula | None:
    beginning = _read(so_far, numbers, operators)
    if beginning is None:
        return None
    *outer, frame = beginning.frames
    level = Level(operators, None if outer else target)
    if beginning.operand is None:
        level.frames[frame, beginning.left] = (0, ())
    else:
        level.take(frame, beginning.operand, beginning.left, (0, ()))
    while outer:
        inner, frame = level.grow(), outer.pop()
        level = Level(operators, None if outer else target)
        for (value, left), (cost, symbols) in inner.items():
            level.take(frame, value, left, (cost, (*symbols, ")")))
    return level.grow().get((target, ()), (0, None))[1]


# ---- reading ---------------------------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """What stands since an open bracket, up to an operator: `total + factor * x`, x being the operand that comes
    next, or `total + factor / x` where it `divides`."""

    total: Exact = 0
    factor: Exact = 1
    divides: bool = False

    def term(self, operand: Exact) -> Exact | None:
        """The last summand with `operand` in it; None for a division by zero."""
        if self.divides and operand == 0:
            return None
        term = Fraction(self.factor, operand) if self.divides else self.factor * operand
        return int(term) if term.denominator == 1 else term

    def signed(self, sign: str) -> "Frame":
        """The same with a sign before its next operand."""
        return self._replace(factor=-self.factor) if sign == "-" else self

    def then(self, operator: str, term: Exact) -> "Frame":
        """The frame that this one becomes by its last summand and an operator."""
        if operator in "*/":
            return Frame(self.total, term, operator == "/")
        return Frame(self.total + term, 1 if operator == "+" else -1)


class Beginning(NamedTuple):
    """A formula up to some symbol. `operand` is what was read last, None where one must come next."""

    frames: tuple[Frame, ...]  # the innermost is last
    operand: Exact | None
    left: Numbers


def _read(symbols: Formula, numbers: Numbers, operators: frozenset[str]) -> Beginning | None:
    """None where no formula of these numbers and operators begins so."""
    frames, operand, left = [Frame()], None, list(numbers)
    for symbol in symbols:
        if operand is None and symbol in map(str, left):
            operand = int(symbol)
            left.remove(int(symbol))
        elif operand is None and symbol in ("+", "-"):
            frames[-1] = frames[-1].signed(symbol)
        elif symbol not in operators or (operand is None) != (symbol == "("):
            return None
        elif operand is None:
            frames.append(Frame())
        elif (term := frames[-1].term(operand)) is None:
            return None
        elif symbol != ")":
            frames[-1], operand = frames[-1].then(symbol, term), None
        elif len(frames) == 1:
            return None
        else:
            operand = frames.pop().total + term
    return Beginning(tuple(frames), operand, tuple(left))


# ---- searching -------------------------------------------------------------------------------------------------------
class Level:
    """All that can be written up to the end of one pair of brackets: open frames and finished values, each with the
    numbers left, at the least cost of getting there. With a `target` no other end counts, nor one that leaves numbers.
    """

    def __init__(self, operators: frozenset[str], target: int | None = None) -> None:
        self.operators = operators
        self.target = target
        self.signs = [sign for sign in WEIGHT if sign in operators]
        self.frames: dict[tuple[Frame, Numbers], Found] = {}
        self.ends: dict[tuple[Exact, Numbers], Found] = {}

    def take(self, frame: Frame, operand: Exact, left: Numbers, found: Found) -> None:
        """Go on with an operand, for which `found` was written."""
        term = frame.term(operand)
        if term is None:
            return
        cost, symbols = found
        cost += FRACTION * (term.denominator > 1)
        if self.target is None or not left:
            keep(self.ends, (frame.total + term, left), (cost, symbols))
        if left:
            for sign in self.signs:
                keep(self.frames, (frame.then(sign, term), left), (cost + WEIGHT[sign], (*symbols, sign)))

    def grow(self) -> dict[tuple[Exact, Numbers], Found]:
        """The ends, once every frame was gone on with in every way."""
        for size in range(max((len(left) for _, left in self.frames), default=0), 0, -1):
            for (frame, left), (cost, symbols) in [item for item in self.frames.items() if len(item[0][1]) == size]:
                for taken, rest in parts(left):
                    if not rest and frame == Frame() and len(taken) > 1:
                        continue  # brackets around everything
                    operands = operands_of(taken, self.operators)
                    for value in operands if rest or self.target is None else wanted(frame, self.target, operands):
                        more, written = operands[value]
                        self.take(frame, value, rest, (cost + more, symbols + written))
        return self.ends


def keep(table: dict, key: tuple, found: Found) -> None:
    known = table.get(key)
    if known is None or found[0] < known[0]:
        table[key] = found


def wanted(frame: Frame, target: int, operands: dict[Exact, Found]) -> Iterator[Exact]:
    """Those of `operands` that make `frame` the target."""
    gap = target - frame.total
    if frame.factor == 0:
        yield from operands if gap == 0 else ()
    elif not frame.divides or gap != 0:
        value = Fraction(frame.factor, gap) if frame.divides else Fraction(gap, frame.factor)
        yield from (value,) if value in operands else ()


@cache
def operands_of(numbers: Numbers, operators: frozenset[str]) -> dict[Exact, Found]:
    """The values of all numbers together as one operand: a single number, or brackets around a formula."""
    if len(numbers) == 1:
        return {numbers[0]: (0, (str(numbers[0]),))}
    if not operators >= BRACKETS:
        return {}
    level = Level(operators)
    level.frames[Frame(), numbers] = (0, ())
    ends = level.grow().items()
    return {value: (cost + BRACKET_PAIR, ("(", *symbols, ")")) for (value, left), (cost, symbols) in ends if not left}


@cache
def parts(numbers: Numbers) -> tuple[tuple[Numbers, Numbers], ...]:
    """The ways to take at least one of the numbers, and what each leaves; few and large ones first."""
    places = range(len(numbers))
    ways = [
        tuple(tuple(numbers[place] for place in places if (place in picked) == taken) for taken in (True, False))
        for size in range(1, len(numbers) + 1)
        for picked in combinations(places, size)
    ]
    return tuple(dict.fromkeys((taken, left) for taken, left in ways))
