"""The best play of Blackjack by exact dynamic programming, in fractions.

Gymnasium's rules: every card from a full deck, hit or stand, the dealer stands on 17 or more, soft ones too. A natural
counts as any other 21. It knows nothing of suits, pictures or thoughts: a hand is its points, aces being 1.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache, reduce
from typing import Literal, NamedTuple

Objective = Literal["win", "value"]
CHANCES = {points: Fraction(4 if points == 10 else 1, 13) for points in range(1, 11)}


class Hand(NamedTuple):
    """`hard` counts aces as 1."""

    hard: int
    ace: bool = False

    @property
    def soft(self) -> bool:
        """Does an ace count 11?"""
        return self.ace and self.hard <= 11

    @property
    def total(self) -> int:
        return self.hard + 10 * self.soft

    def plus(self, points: int) -> "Hand":
        return Hand(self.hard + points, self.ace or points == 1)


class Outcome(NamedTuple):
    """Chances; what is missing to 1 is a draw."""

    win: Fraction
    lose: Fraction

    @property
    def value(self) -> Fraction:
        """The expected reward."""
        return self.win - self.lose


BUST = Outcome(Fraction(0), Fraction(1))


def hand(points: Iterable[int]) -> Hand:
    return reduce(Hand.plus, points, Hand(0))


@cache
def best(mine: Hand, dealer: int, objective: Objective = "win") -> tuple[str, Outcome]:
    """Whether to hit or stand against the dealer's face-up card, and what comes of playing so to the end.

    `win`: the most hands won, and of those the fewest lost. `value`: the most expected reward.
    """
    stand = standing(mine, dealer)
    hit = drawn(lambda card: going_on(mine.plus(card), dealer, objective))
    if objective == "win":
        return ("hit", hit) if (hit.win, -hit.lose) > (stand.win, -stand.lose) else ("stand", stand)
    return ("hit", hit) if hit.value > stand.value else ("stand", stand)


def going_on(mine: Hand, dealer: int, objective: Objective) -> Outcome:
    return BUST if mine.total > 21 else best(mine, dealer, objective)[1]


@cache
def standing(mine: Hand, dealer: int) -> Outcome:
    """What comes of standing."""
    ends = dealer_totals(Hand(0).plus(dealer))
    win = sum((chance for total, chance in ends.items() if total > 21 or total < mine.total), Fraction(0))
    lose = sum((chance for total, chance in ends.items() if mine.total < total <= 21), Fraction(0))
    return Outcome(win, lose)


@cache
def dealer_totals(dealer: Hand) -> dict[int, Fraction]:
    """The chance of each total that the dealer ends with, from a hand that is to be drawn to."""
    ends: dict[int, Fraction] = {}
    for card, chance in CHANCES.items():
        then = dealer.plus(card)
        for total, share in ({then.total: Fraction(1)} if then.total >= 17 else dealer_totals(then)).items():
            ends[total] = ends.get(total, Fraction(0)) + chance * share
    return ends


def drawn(outcome: Callable[[int], Outcome]) -> Outcome:
    """What comes of a card being drawn, where `outcome` says what comes of each."""
    outcomes = [(chance, outcome(card)) for card, chance in CHANCES.items()]
    win, lose = (sum((chance * ends[side] for chance, ends in outcomes), Fraction(0)) for side in (0, 1))
    return Outcome(win, lose)
