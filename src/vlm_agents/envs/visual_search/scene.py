"""Scenes: what lies where in a large picture, what is asked of it, and the picture, drawn when it is asked for.

Cards show a detail too fine to be seen from afar; shapes only lie about. Every detail is grey about the card's own
grey: whatever it is, its mean is the same, so that a picture reduced far enough shows nearly the same card whatever the
answer. What is left, a level or two, is drowned by speckles as large as that picture's pixels. Knows nothing of how
scenes are made up.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from vlm_agents.envs.visual_search.font import glyph
from vlm_agents.envs.visual_search.question import Box, Question
from vlm_agents.pictures import Picture
from vlm_agents.seeds import stable_hash

Detail = Literal["pattern", "dots", "text"]
PATTERNS = ("horizontal", "vertical", "checked", "plain")
DOTS = "abcdefghi"  # the nine places for dots, row by row
COLORS = {
    "red": (214, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (236, 208, 32),
    "green": (40, 150, 60),
    "blue": (36, 84, 214),
    "purple": (140, 50, 170),
    "pink": (240, 130, 190),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "diamond")

GREY, SWING, INK = 128, 60, 100  # of a card; what a pattern, and what ink, departs from it by
# Longest strokes, in pixels of the picture shown, at which a detail can't be seen. A pattern evens out over two
# strokes, a letter only over the nine of its field.
HIDDEN: dict[Detail, float] = {"pattern": 0.42, "dots": 0.16, "text": 0.16}
# What a speckle departs from the card by, at most: with a detail's own, none is clipped.
SPECKLE: dict[Detail, int] = {"pattern": 64, "dots": 24, "text": 24}
ROOM: dict[Detail, int] = {"pattern": 16, "dots": 15, "text": 30}  # strokes across a card's face, at least
LEGIBLE = 1.2  # strokes of so many pixels and more are seen well


@dataclass(frozen=True, slots=True)
class Shape:
    kind: str  # of SHAPES
    color: str
    box: Box
    cell: tuple[int, int]  # column, row


@dataclass(frozen=True, slots=True)
class Card:
    """A square with a frame of `color`. `detail`: one of PATTERNS, the places in DOTS of its dots, or a text."""

    color: str
    box: Box
    cell: tuple[int, int]
    detail: str


@dataclass(frozen=True, slots=True)
class Scene:
    """`size`: width and height in pixels; `cells`: how many columns, and rows, things are placed in; `stroke`: width in
    pixels of the finest thing that an answer depends on; `must_see`: the cards that it depends on."""

    level: str
    seed: int
    size: tuple[int, int]
    cells: int
    ground: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    cards: tuple[Card, ...]
    kind: Detail
    stroke: int
    text: str
    answer: str
    options: tuple[str, ...]
    category: str
    must_see: tuple[Card, ...]

    @property
    def identity(self) -> int:
        """64 bits that depend on what lies in which cell alone: neither on places within a cell, sizes and details,
        nor on level, seed and question. Scenes of one identity look alike from afar."""
        cards = [("card", card.color, card.cell) for card in self.cards]
        shapes = [(shape.kind, shape.color, shape.cell) for shape in self.shapes]
        return stable_hash("visual search", self.cells, *sorted(cards + shapes))

    @property
    def hidden_up_to(self) -> int:
        """The longest side in pixels of a picture shown from which the question can't be answered."""
        return int(HIDDEN[self.kind] * max(self.size) / self.stroke + 1e-9)

    def question(self) -> Question:
        return Question(
            ident=f"{self.level}/{self.seed}",
            text=self.text,
            pictures=(self.picture,),
            answer=self.answer,
            options=self.options,
            category=self.category,
            source="visual_search",
            boxes=tuple(card.box for card in self.must_see),
        )

    def picture(self) -> Picture:
        return Picture(self.draw())

    def draw(self) -> Image.Image:
        """The picture, RGB, of `size`; the same bytes whenever it is drawn."""
        picture = Image.new("RGB", self.size, self.ground)
        pen = ImageDraw.Draw(picture)
        for shape in self.shapes:
            _shape(pen, shape)
        for card in self.cards:
            pen.rectangle(_pen_box(card.box), fill=COLORS[card.color])
            face = face_of(card.box)
            side = face[2] - face[0]
            tile = detail_tile(self.kind, card.detail, side // self.stroke)
            tile = tile.repeat(self.stroke, 0).repeat(self.stroke, 1)
            top, left = ((side - length) // 2 for length in tile.shape)
            grey = GREY + self._speckles(card, side)
            grey[top : top + tile.shape[0], left : left + tile.shape[1]] += tile
            picture.paste(Image.fromarray(grey.astype(np.uint8)).convert("RGB"), face[:2])
        return picture

    def _speckles(self, card: Card, side: int) -> np.ndarray:
        """[side side] integers, evenly drawn for every square as large as a pixel of the picture that may be shown."""
        size = round(self.stroke / HIDDEN[self.kind])
        count = -(-side // size)
        rng = Random(stable_hash("speckles", self.level, self.seed, card.cell))
        most = SPECKLE[self.kind]
        drawn = [round(most * (2 * rng.random() - 1)) for _ in range(count * count)]
        return np.array(drawn).reshape(count, count).repeat(size, 0).repeat(size, 1)[:side, :side]


def face_of(box: Box) -> Box:
    """Where in a card its grey face lies."""
    edge = (box[2] - box[0]) // 6
    return box[0] + edge, box[1] + edge, box[2] - edge, box[3] - edge


def _pen_box(box: Box) -> Box:
    """Pillow's pens include the right and lower edges, its crops don't."""
    return box[0], box[1], box[2] - 1, box[3] - 1


def _shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    left, top, right, bottom = _pen_box(shape.box)
    middle, center = (left + right) // 2, (top + bottom) // 2
    color = COLORS[shape.color]
    if shape.kind == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape.kind == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    elif shape.kind == "triangle":
        pen.polygon([(middle, top), (right, bottom), (left, bottom)], fill=color)
    else:
        pen.polygon([(middle, top), (right, center), (middle, bottom), (left, center)], fill=color)


# ---- details, in strokes ---------------------------------------------------------------------------------------------
def detail_tile(kind: Detail, detail: str, room: int) -> np.ndarray:
    """[H W] integers, one a stroke: how far each departs from the card's grey. Their mean is less than half a level."""
    if kind == "pattern":
        return _pattern(detail, room // 2 * 2)
    if kind == "dots":
        return _dots(detail)
    return np.hstack([_balanced(np.pad(glyph(character), 1)) for character in detail])


def _pattern(name: str, strokes: int) -> np.ndarray:
    """Fades out towards the edges, two strokes at a time: an edge between dark and grey would be seen from afar."""
    turn = np.where(np.arange(strokes) % 2, 1, -1)
    from_edge = np.minimum(np.arange(strokes), np.arange(strokes)[::-1]) // 2
    height = np.minimum(from_edge + 1, 4)
    window = np.outer(height, height) * SWING // 16
    waves = {"horizontal": turn[:, None], "vertical": turn[None], "checked": np.outer(turn, turn), "plain": 0}
    return window * waves[name]


def _dots(places: str) -> np.ndarray:
    tile = np.zeros((15, 15), int)
    dot = np.zeros((3, 3), bool)
    dot[1, 1] = True
    for place in places:
        row, column = divmod(DOTS.index(place), 3)
        tile[row * 5 + 1 : row * 5 + 4, column * 5 + 1 : column * 5 + 4] = _balanced(dot)
    return tile


def _balanced(ink: np.ndarray) -> np.ndarray:
    """Dark where there is ink, and as much lighter where there is none."""
    return np.where(ink, -INK, round(INK * ink.sum() / (ink.size - ink.sum())))
