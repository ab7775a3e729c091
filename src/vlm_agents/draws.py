"""Random draws that are the same on every machine: they ask of `Random` its `random()` alone, whose numbers are the
same in every version of Python."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")


def between(rng: Random, low: int, high: int) -> int:
    """Any of low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[Item]) -> list[Item]:
    """All of them, in any order."""
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in items]
