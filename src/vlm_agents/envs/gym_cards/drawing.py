"""Pictures of the card games, 300x300 RGB, drawn with the fonts that lie in `assets`.

What is drawn is drawn once and kept as a tile; a picture is a background and the tiles laid onto it.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

from vlm_agents.envs.gym_cards.cards import Card

SIDE = 300
SPACE = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
FONT = Path(__file__).parent / "assets" / "DejaVuSans-Bold.ttf"
THIN = FONT.with_name("DejaVuSans.ttf")  # the original's, hinted as there: a pixel more a symbol cuts long formulas
FINE = 4  # what is round is drawn this much larger, then reduced

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
INK: Color = (20, 20, 24)
FELT: Color = (53, 101, 77)
EDGE: Color = (200, 200, 196)
BACK: Color = (44, 74, 140)
WEAVE: Color = (92, 124, 190)
SUIT_COLORS: dict[str, Color] = {"C": INK, "D": (200, 16, 32), "H": (200, 16, 32), "S": INK}

BIG, MIDDLE, SMALL, TINY = (68, 98), (46, 66), (34, 48), (22, 32)  # width and height of a card in Blackjack
SYMBOL_SIZE, LINE, MARGIN = 24, 28, 10  # of a formula, in pixels


# ---- pictures --------------------------------------------------------------------------------------------------------
def number_line(target: int, current: int) -> np.ndarray:
    """[300 300 3] the two numbers."""
    canvas = _ground(PAPER).copy()
    for row, name, number in ((56, "Target:", target), (172, "Current:", current)):
        _lay(canvas, _text(name, 38, INK, PAPER), 16, row)
        _lay(canvas, _text(str(number), 60, INK, PAPER), 210, row - 13)
    return canvas


def blackjack(dealer: Sequence[Card | None], player: Sequence[Card], cut: bool = False) -> np.ndarray:
    """[300 300 3] both hands, None being a card face down; with `cut` five make a row, the fifth beyond the edge."""
    canvas = _ground(FELT).copy()
    for name, hand, top in (("Dealer", dealer, 4), ("Player", player, 140)):
        _lay(canvas, _text(name, 18, PAPER, FELT), 8, top)
        for card, (left, row, size) in zip(hand, _places(len(hand), top + 26, cut), strict=True):
            _lay(canvas, _card(card, *size), left, row)
    return canvas


def points(cards: Sequence[Card], formula: Sequence[str], original: bool = False) -> np.ndarray:
    """[300 300 3] the cards and the formula below them; an `original` one runs out of the picture."""
    canvas = _ground(FELT).copy()
    width, height, top = (136, 180, 7) if len(cards) == 2 else (70, 112, 44)
    gap = (SIDE - width * len(cards)) // (len(cards) + 1)
    for place, card in enumerate(cards):
        _lay(canvas, _card(card, width, height), gap + place * (width + gap), top)
    if original:
        return _with_original_formula(canvas, len(cards), " ".join(formula))
    _lay(canvas, _text("Formula:", 18, PAPER, FELT), MARGIN, 193)
    left, row = MARGIN, 216
    for word in formula:
        tile = _text(word, SYMBOL_SIZE, PAPER, FELT)
        if left + tile.shape[1] > SIDE - MARGIN:
            left, row = MARGIN, row + LINE
        _lay(canvas, tile, left, row)
        left += tile.shape[1] + 6
    return canvas


def _with_original_formula(canvas: np.ndarray, cards: int, formula: str) -> np.ndarray:
    """A copy with the formula in the original's font, size and place: one line, symbols a blank apart."""
    picture = Image.fromarray(canvas)
    lines = ((258, 20, f"Formula: {formula}"),) if cards == 2 else ((210, 16, "Formula:"), (240, 16, formula))
    for top, size, line in lines:
        ImageDraw.Draw(picture).text((MARGIN, top), line, PAPER, _font(size, THIN))
    return np.array(picture)


def _places(count: int, top: int, cut: bool) -> Iterable[tuple[int, int, tuple[int, int]]]:
    """Left, top and size of each card: as large as `count` cards can all be seen."""
    if cut:
        return [(5 + 74 * (i % 5), top + 102 * (i // 5), BIG) for i in range(count)]
    fits = ((4, BIG, 4), (6, MIDDLE, 6), (16, SMALL, 8), (36, TINY, 12))
    size, a_row = next((size, a_row) for most, size, a_row in fits if count <= most)
    step = (SIDE - 8) // a_row
    return [(6 + step * (i % a_row), top + (size[1] + 4) * (i // a_row), size) for i in range(count)]


def _lay(canvas: np.ndarray, tile: np.ndarray, left: int, top: int) -> None:
    """Lay a tile onto the canvas, in place; what hangs over the right or lower edge is cut off."""
    room = canvas[top : top + tile.shape[0], left : left + tile.shape[1]]
    room[:] = tile[: room.shape[0], : room.shape[1]]


# ---- tiles -----------------------------------------------------------------------------------------------------------
@cache
def _ground(color: Color) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), color, dtype=np.uint8)


@cache
def _font(size: int, file: Path = FONT) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _text(words: str, size: int, color: Color, ground: Color) -> np.ndarray:
    """A line of text, as wide as it is and as high as its font."""
    font = _font(size)
    tile = Image.new("RGB", (max(1, round(font.getlength(words))), sum(font.getmetrics())), ground)
    ImageDraw.Draw(tile).text((0, 0), words, color, font)
    return np.asarray(tile)


@cache
def _card(card: Card | None, width: int, height: int) -> np.ndarray:
    """A card on felt: its rank above its suit, both as large as they can be; None is a card face down."""
    tile = Image.new("RGB", (width * FINE, height * FINE), FELT)
    pen = ImageDraw.Draw(tile)
    box = (0, 0, width * FINE - 1, height * FINE - 1)
    pen.rounded_rectangle(box, radius=width * FINE // 11, fill=PAPER, outline=EDGE, width=FINE)
    if card is None:
        _draw_back(pen, width * FINE, height * FINE)
    else:
        color = SUIT_COLORS[card.suit]
        _draw_rank(pen, card.label, width * FINE, height * FINE, color)
        side = round(min(width * 0.62, height * 0.4)) * FINE
        _draw_suit(pen, card.suit, (width * FINE - side) / 2, height * FINE * 0.955 - side, side, color)
    return np.asarray(tile.resize((width, height), Image.Resampling.LANCZOS))


def _draw_rank(pen: ImageDraw.ImageDraw, label: str, width: int, height: int, color: Color) -> None:
    """The label in the upper half, the larger the fewer letters it has."""
    font = _font(round(min(height * 0.55, width * (0.92 if len(label) == 1 else 0.61))))
    pen.text((width / 2, height * 0.29), label, color, font, anchor="mm")


def _draw_back(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    inset, step = width // 12, width // 6
    inner = (inset, inset, width - 1 - inset, height - 1 - inset)
    pen.rounded_rectangle(inner, radius=width // 16, fill=BACK)
    for row, y in enumerate(range(inset + step // 2, height - inset - step // 2, step // 2)):
        for x in range(inset + step // 2 + (row % 2) * step // 2, width - inset - step // 3, step):
            r = step // 5
            pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=WEAVE)


def _draw_suit(pen: ImageDraw.ImageDraw, suit: str, left: float, top: float, side: float, color: Color) -> None:
    """The suit's sign in a square, of circles and polygons given in parts of its side."""

    def at(*places: tuple[float, float]) -> list[tuple[float, float]]:
        return [(left + x * side, top + y * side) for x, y in places]

    def dot(x: float, y: float, r: float) -> None:
        pen.ellipse(at((x - r, y - r), (x + r, y + r)), fill=color)

    if suit == "D":
        pen.polygon(at((0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)), fill=color)
    elif suit == "H":
        dot(0.27, 0.29, 0.25)
        dot(0.73, 0.29, 0.25)
        pen.polygon(at((0.075, 0.445), (0.5, 0.27), (0.925, 0.445), (0.5, 0.98)), fill=color)
    else:
        if suit == "S":
            dot(0.27, 0.60, 0.23)
            dot(0.73, 0.60, 0.23)
            pen.polygon(at((0.085, 0.465), (0.5, 0.0), (0.915, 0.465), (0.5, 0.72)), fill=color)
        else:
            dot(0.5, 0.24, 0.23)
            dot(0.24, 0.60, 0.23)
            dot(0.76, 0.60, 0.23)
            dot(0.5, 0.48, 0.1)
        pen.polygon(at((0.5, 0.4), (0.56, 0.8), (0.72, 1.0), (0.28, 1.0), (0.44, 0.8)), fill=color)
