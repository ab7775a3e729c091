"""What the pictures show: every card and number tells itself from the others, and nothing leaves the picture."""

from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from vlm_agents.envs.gym_cards import drawing
from vlm_agents.envs.gym_cards.cards import SUITS, Card

DECK = [Card(rank, suit) for rank, suit in product(range(1, 14), SUITS)]
ACE = Card(1, "S")


def parts(picture: np.ndarray, *others: np.ndarray) -> list[int]:
    """How many pixels of `picture` differ clearly from each other picture."""
    return [int((np.abs(picture.astype(int) - other).sum(-1) > 100).sum()) for other in others]


def test_every_picture_is_rgb_and_fresh() -> None:
    for draw in (
        lambda: drawing.number_line(3, 1),
        lambda: drawing.blackjack([ACE, None], [ACE, ACE]),
        lambda: drawing.points([ACE] * 4, ["10", "+"]),
    ):
        first, second = draw(), draw()
        assert (first.shape, first.dtype) == ((300, 300, 3), np.uint8)
        first[:] = 0
        assert second.any()
        np.testing.assert_array_equal(second, draw())


@pytest.mark.parametrize("width", [34, 46, 68, 70, 136])
def test_all_52_cards_differ_clearly_and_stay_inside(width: int) -> None:
    """Ranks by at least 3 % of the card's pixels, suits by 0.8 %; paper is left all around what is printed."""
    height = round(width * 1.4)
    tiles = {card: drawing._card(card, width, height) for card in DECK}
    for one, other in combinations(DECK, 2):
        if one.suit == other.suit or one.rank == other.rank:
            least = 0.03 if one.suit == other.suit else 0.008
            assert parts(tiles[one], tiles[other])[0] > least * width * height, (one, other)
    rim = np.ones((height, width), bool)
    rim[height // 40 + 1 : -(height // 40) - 1, width // 40 + 1 : -(width // 40) - 1] = False
    faceless = np.median(np.stack(list(tiles.values())), axis=0)
    for card, tile in tiles.items():
        assert (np.abs(tile[rim].astype(int) - faceless[rim]).sum(-1) < 100).all(), card
    back = drawing._card(None, width, height)
    assert min(parts(back, *tiles.values())) > 0.3 * width * height


def test_ranks_are_large() -> None:
    """In Points24 a digit is at least 30 pixels high: two of a vision model's 14-pixel patches, also at 224 pixels."""
    for rank in range(1, 14):
        tile = drawing.points([Card(rank, "S")] * 4, [])[44:156, 5:75]  # one card of 70 x 112
        rows = np.flatnonzero((tile[:60, 8:-8] < 128).all(-1).any(-1))
        assert rows[-1] - rows[0] >= 30, rank


def test_suits_are_black_or_red() -> None:
    for suit, red in (("C", False), ("D", True), ("H", True), ("S", False)):
        tile = drawing._card(Card(8, suit), 68, 98)
        printed = tile[(tile.min(-1) < 60) & (tile.max(-1) != 101)]
        assert (np.median(printed[:, 0]) > 150) == red


def test_each_number_on_the_line_shows() -> None:
    pictures = [drawing.number_line(t, c) for t in range(6) for c in range(6)]
    for one, other in combinations(pictures, 2):
        assert parts(one, other)[0] > 200
    # Two digits fit in too: the last columns stay white.
    assert (drawing.number_line(99, 88)[:, -2:] == 255).all()


def test_a_formula_of_any_length_shows_its_last_symbol() -> None:
    longest = ["10", "+", "(", "10", "*", "10", ")", "-", "10"] + ["+"] * 12
    hand = [Card(12, "H")] * 4
    for length in range(1, len(longest) + 1):
        formula = longest[:length]
        without = drawing.points(hand, formula[:-1])
        assert parts(drawing.points(hand, formula), without)[0] > 20
        assert parts(drawing.points(hand, formula), drawing.points(hand, [*formula[:-1], "="]))[0] > 10
    wrapped = drawing.points(hand, longest)
    np.testing.assert_array_equal(wrapped[:193], drawing.points(hand, [])[:193])  # the cards stay as they are
    assert (wrapped[-2:] == drawing.FELT).all()


def test_the_original_s_formula_leaves_the_picture() -> None:
    formula = ["10", "+"] * 8
    hand = [ACE] * 4
    seen = drawing.points(hand, formula, original=True)
    np.testing.assert_array_equal(seen, drawing.points(hand, [*formula, "*", "9"], original=True))
    np.testing.assert_array_equal(seen[262:], drawing.points(hand, [], original=True)[262:])


@pytest.mark.parametrize(
    ("formula", "end"),
    [
        # In DejaVu Sans of 16 pixels a digit takes 10, + 13, * 8, - and brackets 6, / and a blank 5; it begins at 10.
        ("1 2 3 4", 10 + 4 * 10 + 3 * 5),
        ("+ + + + + + + + + + + + + + +", 10 + 15 * 13 + 14 * 5),
        ("( ( 10 - 4 ) * ( 7 - 3 ) ) / ( 5 - 4 ) - ( 1", 10 + 8 * 10 + 10 * 6 + 8 + 5 + 3 * 6 + 21 * 5),  # 22 symbols
        ("( ( 10 + 4 ) * ( 7 + 3 ) ) / ( 5 + 4 ) + ( 10", 300),  # 324, cut off
    ],
)
def test_the_original_s_formula_is_as_long_as_there(formula: str, end: int) -> None:
    hand, symbols = [ACE] * 4, formula.split()
    seen = drawing.points(hand, symbols, original=True)
    columns = np.flatnonzero((seen != drawing.points(hand, [], original=True)).any((0, 2)))
    assert columns[-1] == pytest.approx(end - 1, abs=2)  # up to two columns of a symbol's width stay empty


@pytest.mark.parametrize(("cards", "rows"), [(2, (258, 282)), (4, (210, 259))])
def test_the_original_s_formula_stands_where_it_stood(cards: int, rows: tuple[int, int]) -> None:
    empty = drawing.points([ACE] * cards, [], original=True)
    written = (empty != drawing.FELT).any(-1)[190:].nonzero()
    assert rows[0] <= 190 + written[0].min() < rows[0] + 8
    assert written[1].min() == pytest.approx(11, abs=1)
    full = drawing.points([ACE] * cards, ["(", "7"], original=True)
    changed = np.flatnonzero((full != empty).any((1, 2)))
    assert rows[0] <= changed[0] <= changed[-1] < rows[1]


def test_hands_of_every_size_lie_inside_without_overlapping() -> None:
    for count in range(2, 25):
        cards = drawing._places(count, 166, cut=False)
        covered = np.zeros((300, 300), int)
        for left, top, (width, height) in cards:
            assert left + width <= 300
            assert top + height <= 300
            covered[top : top + height, left : left + width] += 1
        assert covered.max() == 1
    # The dealer draws at most ten more cards, and they leave the word Player free.
    assert all(top + size[1] <= 140 for _, top, size in drawing._places(12, 30, cut=False))


def written(letter: str, font: ImageFont.FreeTypeFont) -> bytes:
    tile = Image.new("L", (32, 32))
    ImageDraw.Draw(tile).text((0, 0), letter, 255, font)
    return tile.tobytes()


def test_the_fonts_come_along_with_their_licence() -> None:
    letters = "0123456789AJQK+-*/()=_:\u2660"
    for file, style in ((drawing.FONT, "Bold"), (drawing.THIN, "Book")):
        font = drawing._font(20, file)
        assert font.getname() == ("DejaVu Sans", style)
        tiles = {written(letter, font) for letter in letters}
        assert len(tiles) == len(letters)  # all differ, from the box of one that is missing too
    licence = (drawing.FONT.parent / "LICENSE").read_text()
    assert "Copyright (c) 2003 by Bitstream" in licence
    assert "Permission is hereby granted" in licence
