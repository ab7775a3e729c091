"""The solver: canonical formulas, completions of any beginning, and which hands can't be solved at all."""

import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product
from math import factorial, prod

import numpy as np
import pytest

from vlm_agents.envs.gym_cards.formula import evaluate, solvable
from vlm_agents.experts.points import Formula, complete

ALL = "+-*/()"
HANDS = list(combinations_with_replacement(range(1, 11), 4))


def solve(numbers: tuple[int, ...], target: int, operators: str) -> Formula | None:
    return complete((), numbers, target, operators, max_symbols=99)


def written(numbers: tuple[int, ...], target: int = 24, operators: str = ALL) -> str | None:
    formula = solve(numbers, target, operators)
    return None if formula is None else " ".join(formula)


def completed(so_far: str, numbers: tuple[int, ...], target: int = 24, longest: int = 20) -> str | None:
    rest = complete(so_far.split(), numbers, target, ALL, longest)
    return None if rest is None else " ".join(rest)


# ---- solving ---------------------------------------------------------------------------------------------------------
def test_which_hands_make_24():
    """566 of 715; by the chance of each when cards are drawn one by one and faces are tens, 0.7309 of the deals."""
    solved = {hand: formula for hand in HANDS if (formula := solve(hand, 24, ALL))}
    assert (len(HANDS), len(solved)) == (715, 566)
    assert all((hand in solved) == solvable(hand, 24) for hand in HANDS[::24])
    for hand, formula in solved.items():
        assert evaluate(formula) == 24
        assert sorted(int(symbol) for symbol in formula if symbol.isdigit()) == list(hand)
    # 4! / (orders of equal cards) * product of 1/13, or of 4/13 for a ten
    chances = {
        hand: Fraction(factorial(4), prod(map(factorial, Counter(hand).values()))) * Fraction(4, 1) ** hand.count(10)
        for hand in HANDS
    }
    assert sum(chances.values()) == 13**4
    assert round(float(sum(chances[hand] for hand in solved) / 13**4), 4) == 0.7309


@pytest.mark.parametrize(
    ("numbers", "formula"),
    [
        ((6, 6, 6, 6), "6 + 6 + 6 + 6"),
        ((3, 9, 6, 6), "9 + 6 + 6 + 3"),  # large numbers on the left
        ((4, 9, 9, 10), "10 + 9 + 9 - 4"),
        ((2, 5, 10, 9), "10 * 2 + 9 - 5"),
        ((2, 8, 8, 8), "8 * 8 / 2 - 8"),  # no brackets, although it takes a division
        ((1, 2, 3, 8), "2 * ( 8 + 3 + 1 )"),
        ((1, 3, 4, 6), "6 / ( 1 - 3 / 4 )"),
        ((8, 3, 8, 3), "8 / ( 3 - 8 / 3 )"),
        ((5, 5, 5, 1), "5 * ( 5 - 1 / 5 )"),
        ((1, 1, 1, 1), None),
        ((7, 7, 10, 10), None),
    ],
)
def test_the_canonical_formula_is_the_plainest_and_the_same_in_any_order(numbers: tuple[int, ...], formula: str | None):
    assert {written(order) for order in permutations(numbers)} == {formula}


def test_other_numbers_targets_and_operators():
    assert written((13, 11), 24) == "13 + 11"
    assert written((12, 13, 1, 2), 24, "+-*/()") is not None
    assert written((2, 3), 12, "+*") is None
    assert written((5,), 5) == "5"
    assert written((1, 2, 3), 9, "+*()") == "3 * ( 2 + 1 )"
    assert written((1, 2, 3), 9, "+*") is None  # 3 * 2 + 1 = 7, 3 * 1 + 2 = 5, 2 * 1 + 3 = 5, 6 and 6
    assert written((10, 9, 8, 7, 6), 24) is not None


def test_every_deal_of_ezpoints_is_solved_by_plus_and_times():
    for first in range(2, 11):
        for second in {12 - first} | ({12 // first} if 12 % first == 0 else set()):
            formula = solve((first, second), 12, "+*=123456789")
            assert formula is not None
            assert len(formula) == 3
            assert evaluate(formula) == 12


# ---- completing ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("so_far", "numbers", "rest"),
    [
        ("", (8, 3, 8, 3), "8 / ( 3 - 8 / 3 )"),
        ("8 / (", (8, 3, 8, 3), "3 - 8 / 3 )"),
        ("8 / ( 3 - 8 / 3 )", (8, 3, 8, 3), ""),
        ("3", (8, 3, 8, 3), None),  # there is no other formula for this hand
        ("6", (9, 6, 6, 3), "+ 9 + 6 + 3"),
        ("( ( 6", (9, 6, 6, 3), "+ 9 + 6 + 3 ) )"),
        ("( 6 ) +", (9, 6, 6, 3), "9 + 6 + 3"),
        ("9 + 6 + 6 + 3 (", (9, 6, 6, 3), None),
        ("- 4 + (", (4, 9, 9, 10), "10 + 9 + 9 )"),
        ("9 - - 9 - 4", (4, 9, 9, 10), "+ 10"),
        ("9 6", (9, 6, 6, 3), None),
        ("9 * 6 +", (9, 6, 6, 3), None),  # 54 and 6 or 3
        ("9 9", (9, 6, 6, 3), None),
        ("9 + 9", (9, 6, 6, 3), None),
        ("7", (9, 6, 6, 3), None),
        (")", (9, 6, 6, 3), None),
        ("9 )", (9, 6, 6, 3), None),
        ("( )", (9, 6, 6, 3), None),
        ("9 + * 6", (9, 6, 6, 3), None),
        ("9 =", (9, 6, 6, 3), None),
        ("9 / ( 6 - 6 )", (9, 6, 6, 3), None),
        ("1", (1, 1, 1, 1), None),
    ],
)
def test_a_beginning_is_completed_if_it_can_be(so_far: str, numbers: tuple[int, ...], rest: str | None):
    assert completed(so_far, numbers) == rest
    assert rest is None or evaluate((*so_far.split(), *rest.split())) == 24


def test_of_all_words_of_a_game_only_operators_are_operators():
    words = (*map(str, range(1, 11)), *ALL, "=")
    assert complete(["7", "*", "5", "-"], (7, 5, 10, 1), 24, words, 20) == ("10", "-", "1")
    assert complete(["7", "*", "5", "3"], (7, 5, 10, 1), 24, words, 20) is None
    assert complete(["7", "*", "5", "="], (7, 5, 10, 1), 24, words, 20) is None


def test_nothing_times_anything():
    assert completed("( 5 - 5 ) *", (5, 5, 7), target=0) == "7"
    assert completed("( 5 - 5 ) /", (5, 5, 7), target=0) == "7"
    assert completed("( 5 - 5 ) *", (5, 5, 7), target=7) is None


def test_the_limit_counts_what_is_written():
    assert completed("( ( 9 + 6 ) +", (9, 6, 6, 3), longest=11) == "6 + 3 )"  # 7 and 4 symbols
    assert completed("( ( 9 + 6 ) +", (9, 6, 6, 3), longest=10) is None
    assert completed("", (8, 3, 8, 3), longest=8) is None


def sequences(numbers: list[int], longest: int) -> Iterator[tuple[str, ...]]:
    """Every formula of all numbers up to a length, brackets around anything. Made by the grammar, not by values."""
    signs = [*product("+-*/", repeat=len(numbers) - 1)]

    def grow(so_far: tuple[str, ...], left: tuple[str, ...], signs: str, depth: int, operand: bool) -> Iterator:
        if not left and not depth and operand:
            yield so_far
        if len(so_far) == longest:
            return
        if operand:
            if depth:
                yield from grow((*so_far, ")"), left, signs, depth - 1, True)
            if left:
                yield from grow((*so_far, signs[0]), left, signs[1:], depth, False)
        else:
            yield from grow((*so_far, "("), left, signs, depth + 1, False)
            yield from grow((*so_far, left[0]), left[1:], signs, depth, True)

    for order in sorted(set(permutations(map(str, numbers)))):
        for chosen in signs:
            yield from grow((), order, "".join(chosen), 0, False)


@pytest.mark.parametrize(("numbers", "target"), [([3, 8], 24), ([2, 2], 4), ([2, 3, 4], 20), ([1, 2, 6], 8)])
def test_completions_are_as_short_as_any_and_there_is_none_where_none_is_found(numbers: list[int], target: int):
    """Against every formula there is, of up to 9 symbols."""
    shortest: dict[tuple[str, ...], int | None] = {}
    for formula in sequences(numbers, 9):
        right = evaluate(formula) == target
        for end in range(len(formula) + 1):
            known = shortest.setdefault(formula[:end], None)
            if right and (known is None or len(formula) < known):
                shortest[formula[:end]] = len(formula)
    assert None in shortest.values()
    for beginning, length in shortest.items():
        rest = complete(beginning, numbers, target, ALL, 9)
        assert (None if rest is None else len(beginning) + len(rest)) == length, beginning
        assert rest is None or evaluate((*beginning, *rest)) == target


def test_after_slips_a_completion_makes_24_and_is_found_quickly():
    rng = np.random.default_rng(0)
    seconds, found = [], 0
    while len(seconds) < 300:
        numbers = tuple(int(number) for number in np.minimum(rng.integers(1, 14, size=4), 10))
        if solve(numbers, 24, ALL) is None:
            continue
        formula: list[str] = []
        for _ in range(rng.integers(1, 8)):
            begin = time.process_time()
            rest = complete(formula, numbers, 24, ALL, 20)
            seconds.append(time.process_time() - begin)
            if rest is not None:
                found += 1
                assert evaluate((*formula, *rest)) == 24
            slip = str(rng.choice([*map(str, numbers), *ALL]))
            formula.append(rest[0] if rest and rng.random() < 0.7 else slip)
    assert found > 100
    assert np.median(seconds) < 1e-3
    assert max(seconds) < 1  # 60 ms, where "(" begins a hand whose canonical formula begins otherwise
