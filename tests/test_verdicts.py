"""What rules can say of an answer, and what they leave open."""

import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_agents.types import Claim
from vlm_agents.verdicts import LONGEST, by_rule, hopeless

COLORS = ("blue", "red", "a red car")
NUMBERED = ("2", "3", "10")
LETTERED = ("A. blue", "B. red")


def judged(answer: str, right: str, *options: str) -> bool | None:
    return by_rule(Claim("Which?", answer, right, options))


@pytest.mark.parametrize(
    ("answer", "right", "verdict"),
    [
        # words
        ("Red.", "red", True),
        ("  'red' \n", "RED", True),
        ("dark  red", "Dark red!", True),
        (r"$\text{red}$", "red", True),
        (r"\boxed{\text{red}}", "red", True),
        ("a postman", "mailman", None),
        ("red or blue", "red", None),
        ("[1, 2]", "(1, 2)", None),  # intervals that differ
        ("<5", ">5", None),
        # numbers
        ("1,000", "1000", True),
        ("$1,000.", "1000", True),
        ("0.50", ".5", True),
        (".5", "5", False),
        ("5.", "5", True),
        ("+3", "3", True),
        ("\u22123", "-3", True),  # a minus sign
        ("-3", "3", False),
        ("50%", "50 %", True),
        ("50%", "5%", False),
        ("50%", "50", None),  # of a table in per cent it may be right
        ("1/2", "0.5", True),
        ("1 1/2", "1.5", True),
        (r"\frac{1}{2}", "0.50", True),
        (r"-\dfrac{1}{3}", "-2/6", True),
        ("1/3", "0.33", False),
        ("1/0", "1", None),
        ("3.0001", "3", False),
        ("5 cm", "5", None),
        ("five", "5", None),
        ("1,5", "15", None),  # in some countries 1.5
        ("1e3", "1000", None),
    ],
)
def test_words_and_numbers(answer: str, right: str, verdict: bool | None):
    assert judged(answer, right) is verdict


@pytest.mark.parametrize(
    ("answer", "right", "options", "verdict"),
    [
        ("B", "B", COLORS, True),
        ("(b).", "B", COLORS, True),
        ("B) red", "B", COLORS, True),
        ("B: red", "red", COLORS, True),
        ("**B**", "red", COLORS, True),
        ("Red", "B", COLORS, True),
        ("A", "B", COLORS, False),
        ("blue", "B", COLORS, False),
        ("(A) blue", "red", COLORS, False),
        ("E", "B", COLORS, False),  # there is no such option
        ("B. blue", "B", COLORS, None),  # the letter says one thing and the word another
        ("crimson", "B", COLORS, None),
        ("a red car", "C", COLORS, True),  # that is no option A
        ("blue", "green", COLORS, None),  # the right one is none of the options
        ("3.0", "B", NUMBERED, True),
        ("3", "2", NUMBERED, False),
        ("C", "10", NUMBERED, True),
        ("B", "B. red", LETTERED, True),
        ("red", "B", LETTERED, True),
        ("A", "red", LETTERED, False),
        ("(C)", "C", (), True),
        ("C", "(D)", (), False),  # letters of options that aren't known
        ("a car", "A", (), None),
        ("A", "B", ("B", "A"), None),  # is it the option that is called A, or the first one?
    ],
)
def test_options(answer: str, right: str, options: tuple[str, ...], verdict: bool | None):
    assert judged(answer, right, *options) is verdict


@pytest.mark.parametrize("answer", ["", " \n", "...", "``", "x" * LONGEST])
def test_no_answer_and_one_without_end_are_wrong(answer: str):
    assert hopeless(answer)
    assert judged(answer, answer) is False
    assert judged(answer, "B", *COLORS) is False
    assert judged("x" * (LONGEST - 1), "x" * (LONGEST - 1)) is True


@given(st.text(max_size=LONGEST + 10), st.text(max_size=30), st.lists(st.text(max_size=9), max_size=4))
def test_any_texts_are_judged(answer: str, right: str, options: list[str]):
    verdict = judged(answer, right, *options)
    assert verdict in (True, False, None)
    assert (verdict is False) or not hopeless(answer)
    assert hopeless(right) or judged(right, right, *options) is True


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(-(10**9), 10**9))
def test_a_number_is_its_value(above: int, below: int, other: int):
    assert judged(f"{above:,}", str(above)) is True
    assert judged(f"{above}/{below}", f" {above:,} / {below:,}.") is True
    assert judged(f"{above}/{below}", str(other)) is (Fraction(above, below) == other)


def test_formulas_need_math_verify(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as where it isn't installed
    assert judged("2^{1/2}", r"\sqrt{2}") is None
    monkeypatch.undo()
    pytest.importorskip("math_verify")
    assert judged("2^{1/2}", r"\sqrt{2}") is True
    assert judged("2", r"\sqrt{2}") is None
