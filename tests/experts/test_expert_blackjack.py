"""Blackjack's best play: the chances as published, and as they come about on Gymnasium's own env and on ours."""

from fractions import Fraction
from typing import Any

import gymnasium
import numpy as np
import pytest

from vlm_agents.envs.gym_cards.blackjack import BlackjackGame
from vlm_agents.experts.blackjack import (
    CHANCES,
    Hand,
    Objective,
    Outcome,
    best,
    dealer_totals,
    drawn,
    hand,
    standing,
)


def overall(objective: Objective) -> Outcome:
    """The chances of a whole hand, before any card is dealt."""
    return drawn(lambda up: drawn(lambda one: drawn(lambda two: best(hand((one, two)), up, objective)[1])))


def test_the_chances_of_a_whole_hand():
    value, win = overall("value"), overall("win")
    assert round(float(value.win), 4) == 0.4295
    assert round(float(value.lose), 4) == 0.4760
    assert round(float(win.win), 4) == 0.4316
    assert win.win > value.win
    assert value.value > win.value


def test_hands():
    assert hand((10, 6)) == Hand(16)
    assert (hand((1, 6)).soft, hand((1, 6)).total) == (True, 17)
    assert (hand((1, 6, 10)).soft, hand((1, 6, 10)).total) == (False, 17)
    assert (hand((1, 1)).soft, hand((1, 1)).total) == (True, 12)
    assert hand((1, 10)).total == 21


def test_the_dealer_stands_on_17_soft_ones_too():
    # from a soft 6 + 10 = 16: an ace makes 17, ..., 5 makes 21; 6 to ten make 12 to 16, hard, which are drawn to
    ends = dealer_totals(hand((1, 5)))
    assert set(ends) == {17, 18, 19, 20, 21, 22, 23, 24, 25, 26}
    assert sum(ends.values()) == 1
    # from a hard 16: an ace makes 17, 5 makes 21, the tens 26
    ends = dealer_totals(hand((10, 6)))
    assert (ends[17], ends[21], ends[26]) == (Fraction(1, 13), Fraction(1, 13), Fraction(4, 13))


def test_standing():
    # 21 never loses: it draws when the dealer has 21 too
    for up in CHANCES:
        assert standing(Hand(21), up).lose == 0
        assert standing(Hand(21), up).win == 1 - dealer_totals(Hand(0).plus(up)).get(21, 0)
        # 16 or less wins only when the dealer busts
        assert standing(Hand(16), up) == standing(Hand(4), up)


@pytest.mark.parametrize(
    ("cards", "dealer", "win", "value"),
    [
        ((10, 6), 10, "stand", "hit"),  # where the two differ: drawing makes a draw of a loss
        ((10, 7), 1, "hit", "stand"),
        ((10, 6), 7, "hit", "hit"),
        ((10, 3), 2, "stand", "stand"),
        ((10, 2), 4, "stand", "stand"),
        ((1, 6), 5, "hit", "hit"),  # soft 17
        ((1, 7), 7, "stand", "stand"),
        ((1, 7), 8, "hit", "stand"),
        ((1, 7), 9, "hit", "hit"),
        ((5, 6), 1, "hit", "hit"),
        ((1, 10), 1, "stand", "stand"),
    ],
)
def test_what_to_do(cards: tuple[int, ...], dealer: int, win: str, value: str):
    assert best(hand(cards), dealer)[0] == win
    assert best(hand(cards), dealer, "value")[0] == value


# ---- played ----------------------------------------------------------------------------------------------------------
def test_hands_on_gymnasiums_env_come_out_as_computed():
    game: Any = gymnasium.make("Blackjack-v1", disable_env_checker=True).unwrapped
    hands, wins = 20_000, 0
    (total, dealer, soft), _ = game.reset(seed=0)
    for _ in range(hands):
        over, reward = False, 0.0
        while not over:
            action, _ = best(Hand(total - 10, True) if soft else Hand(total), dealer)
            (total, dealer, soft), reward, over, _, _ = game.step(int(action == "hit"))
        wins += reward > 0
        (total, dealer, soft), _ = game.reset()
    assert abs(wins / hands - overall("win").win) < 0.014  # a rate near 1/2 deviates by 0.0035; four of it


class Unseen(BlackjackGame):
    """The game without its pictures, which take most of its time."""

    def render(self) -> np.ndarray:
        return np.zeros(0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["win", "value"])
def test_200_000_hands_on_our_env_come_out_as_computed(objective: Objective):
    game = Unseen()
    hands, wins, losses = 200_000, 0, 0
    game.reset(seed=0)
    for _ in range(hands):
        reward = 0.0
        while not game.over:
            action, _ = best(hand(card.points for card in game.player), game.dealer[0].points, objective)
            _, reward, *_ = game.step(game.words.index(action))
        wins += reward > 0
        losses += reward < 0
        game.reset()
    expected = overall(objective)
    # the deviation is 0.0011; four of it
    assert abs(wins / hands - expected.win) < 0.0045
    assert abs(losses / hands - expected.lose) < 0.0045
