"""A playing card, and how cards are drawn from a deck that never ends."""

from dataclasses import dataclass

import numpy as np

SUITS = "CDHS"
LABELS = ("A", *map(str, range(2, 11)), "J", "Q", "K")


@dataclass(frozen=True, slots=True)
class Card:
    """`rank` is 1 (ace) to 13 (king), `suit` one of C, D, H, S."""

    rank: int
    suit: str

    @property
    def label(self) -> str:
        """The rank as it stands on the card: A, 2 to 10, J, Q, K."""
        return LABELS[self.rank - 1]

    @property
    def points(self) -> int:
        """The rank, where J, Q and K count as ten."""
        return min(self.rank, 10)

    def __str__(self) -> str:
        return self.label + self.suit


def with_suit(rank: int, rng: np.random.Generator) -> Card:
    return Card(rank, SUITS[rng.integers(4)])


def draw(rng: np.random.Generator) -> Card:
    """Any of the 52 cards."""
    return with_suit(int(rng.integers(1, 14)), rng)
