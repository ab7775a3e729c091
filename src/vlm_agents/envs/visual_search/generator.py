"""Makes scenes: a pure function of a level and a seed. Held-out seeds draw from scenes of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from vlm_agents.draws import between, pick, shuffled
from vlm_agents.envs.visual_search.question import Box
from vlm_agents.envs.visual_search.scene import COLORS, DOTS, HIDDEN, PATTERNS, ROOM, SHAPES, Card, Detail, Scene, Shape
from vlm_agents.errors import ConfigError, did_you_mean
from vlm_agents.seeds import held_out, stable_hash

DIGITS = "123456789"
CHARACTERS = "ABCDEFGHJKLMNPRTUVWXY346789"  # none that is easily taken for another: no O and 0, no S and 5, no I and 1
LETTERS = [character for character in CHARACTERS if character.isalpha()]
CODE = 4  # characters of a longer text
FRACTIONS = 5  # one in so many scenes is held out


@dataclass(frozen=True, slots=True)
class Level:
    """`sides`: shortest and longest, in pixels; `cells`: columns and rows, one thing a cell; `shown`: the longest side
    of a picture that may be shown without giving the answer away; the least and most cards and shapes; what share of
    its cell a card spans."""

    sides: tuple[int, int]
    cells: int
    shown: int
    tasks: tuple[str, ...]
    cards: tuple[int, int]
    shapes: tuple[int, int]
    span: tuple[float, float]


HARD = ("text", "dots", "position", "odd_one", "tally")
LEVELS = {
    "tiny": Level((1000, 1000), 3, 84, ("pattern",), (1, 1), (1, 2), (0.5, 0.8)),
    "easy": Level((1200, 1200), 4, 168, ("pattern",), (2, 4), (2, 5), (0.5, 0.8)),
    "medium": Level((2100, 2400), 5, 336, ("digit", "dots"), (3, 6), (4, 10), (0.25, 0.4)),
    "hard": Level((2100, 3000), 7, 336, HARD, (6, 12), (14, 28), (0.3, 0.5)),
    "extreme": Level((3000, 4000), 10, 448, HARD, (12, 24), (40, 70), (0.2, 0.35)),
}


class Task(NamedTuple):
    """What is asked: the cards' colours and details, and which of them must be seen."""

    colors: Sequence[str]
    details: Sequence[str]
    text: str
    answer: str
    options: Sequence[str]
    must_see: Sequence[int]


def generate(level: str, seed: int) -> Scene:
    """The scene of a level and a seed, held out if and only if the seed is. ConfigError for an unknown level."""
    if level not in LEVELS:
        raise ConfigError(f"there is no level '{level}'; known: {', '.join(LEVELS)}.{did_you_mean(level, LEVELS)}")
    rng = Random(stable_hash("visual search", level, seed))
    while True:
        scene = _scene(level, seed, rng)
        if is_held_out(scene) == held_out(seed):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Is it one of those that only held-out seeds draw? A fifth of all, by what lies where: a scene that differs from
    one of the training only in pixels, details or the question can't be among them."""
    return scene.identity % FRACTIONS == 0


def _scene(level: str, seed: int, rng: Random) -> Scene:
    rules = LEVELS[level]
    name = pick(rng, rules.tasks)
    kind, most, task = TASKS[name]
    size = between(rng, *rules.sides), between(rng, *rules.sides)
    stroke = int(HIDDEN[kind] * max(size) / rules.shown + 1e-9)
    cells = shuffled(rng, [(column, row) for column in range(rules.cells) for row in range(rules.cells)])
    cards = min(between(rng, *rules.cards), most)
    shapes = between(rng, *rules.shapes)
    least = ROOM[kind] * stroke * 3 // 2 + 3  # its face is two thirds of a card
    boxes = [_placed(rng, cell, rules.cells, size, rules.span, least) for cell in cells[:cards]]
    asked = task(rng, boxes)
    drawn = [Card(*card) for card in zip(asked.colors, boxes, cells, asked.details, strict=False)]
    return Scene(
        level=level,
        seed=seed,
        size=size,
        cells=rules.cells,
        ground=(between(rng, 205, 240), between(rng, 205, 240), between(rng, 205, 240)),
        shapes=tuple(
            Shape(pick(rng, SHAPES), pick(rng, list(COLORS)), _placed(rng, cell, rules.cells, size, (0.2, 0.8)), cell)
            for cell in cells[cards : cards + shapes]
        ),
        cards=tuple(drawn),
        kind=kind,
        stroke=stroke,
        text=asked.text,
        answer=asked.answer,
        options=tuple(asked.options),
        category=name,
        must_see=tuple(drawn[index] for index in asked.must_see),
    )


def _placed(
    rng: Random, cell: tuple[int, int], cells: int, size: tuple[int, int], span: tuple[float, float], least: int = 0
) -> Box:
    """A square somewhere within a cell: nothing overlaps."""
    width, height = size[0] // cells, size[1] // cells
    side = max(least, int(min(width, height) * (span[0] + (span[1] - span[0]) * rng.random())))
    left, top = cell[0] * width + between(rng, 0, width - side), cell[1] * height + between(rng, 0, height - side)
    return left, top, left + side, top + side


# ---- tasks: each asks something of cards that lie in these boxes -----------------------------------------------------
def _of_one(rng: Random, boxes: Sequence[Box], details: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The colour of the first card, which no other has, and everyone's."""
    color, *others = shuffled(rng, list(COLORS))
    return color, [color, *(others[index % len(others)] for index in range(len(details) - 1))]


def _pattern(rng: Random, boxes: Sequence[Box]) -> Task:
    details = [pick(rng, PATTERNS) for _ in boxes]
    color, colors = _of_one(rng, boxes, details)
    return Task(colors, details, f"Which pattern is on the {color} card?", details[0], PATTERNS, [0])


def _digit(rng: Random, boxes: Sequence[Box]) -> Task:
    details = [pick(rng, DIGITS) for _ in boxes]
    color, colors = _of_one(rng, boxes, details)
    return Task(colors, details, f"Which digit is on the {color} card?", details[0], (), [0])


def _dots(rng: Random, boxes: Sequence[Box]) -> Task:
    details = ["".join(sorted(shuffled(rng, DOTS)[: between(rng, 1, len(DOTS))])) for _ in boxes]
    color, colors = _of_one(rng, boxes, details)
    return Task(colors, details, f"How many dots are on the {color} card?", str(len(details[0])), (), [0])


def _text(rng: Random, boxes: Sequence[Box]) -> Task:
    """The wrong options differ from what is written in one character."""
    details = ["".join(pick(rng, CHARACTERS) for _ in range(CODE)) for _ in boxes]
    color, colors = _of_one(rng, boxes, details)
    right, options = details[0], [details[0]]
    while len(options) < 4:
        place = between(rng, 0, CODE - 1)
        wrong = right[:place] + pick(rng, CHARACTERS) + right[place + 1 :]
        options += [wrong] if wrong not in options else []
    return Task(colors, details, f"What is written on the {color} card?", right, shuffled(rng, options), [0])


def _position(rng: Random, boxes: Sequence[Box]) -> Task:
    """Of two cards that are told apart by their letters alone; along the axis on which they are farther apart."""
    letters = shuffled(rng, LETTERS)[: len(boxes)]
    color = pick(rng, list(COLORS))
    across, down = (boxes[0][axis] - boxes[1][axis] for axis in (0, 1))
    options = ("left of", "right of") if abs(across) >= abs(down) else ("above", "below")
    text = f"Is the card {letters[0]} {' or '.join(options)} the card {letters[1]}?"
    answer = options[(across if abs(across) >= abs(down) else down) > 0]
    return Task([color] * len(boxes), letters, text, answer, options, [0, 1])


def _odd_one(rng: Random, boxes: Sequence[Box]) -> Task:
    common, odd = shuffled(rng, LETTERS)[:2]
    colors = shuffled(rng, list(COLORS))[: len(boxes)]
    text = "All cards but one show the same letter. What colour is the other one?"
    options = shuffled(rng, [colors[0], *shuffled(rng, colors[1:])[:3]])
    return Task(colors, [odd, *[common] * (len(boxes) - 1)], text, colors[0], options, range(len(boxes)))


def _tally(rng: Random, boxes: Sequence[Box]) -> Task:
    asked, *others = shuffled(rng, LETTERS)
    count = between(rng, 1, len(boxes))
    details = [asked] * count + [pick(rng, others) for _ in boxes[count:]]
    color = pick(rng, list(COLORS))
    text = f"How many cards show the letter {asked}?"
    return Task([color] * len(boxes), details, text, str(count), (), range(len(boxes)))


# Of each: how its details are drawn, and how many cards at most, where each must be looked at.
TASKS: dict[str, tuple[Detail, int, Callable[[Random, Sequence[Box]], Task]]] = {
    "pattern": ("pattern", 99, _pattern),
    "digit": ("text", 99, _digit),
    "dots": ("dots", 99, _dots),
    "text": ("text", 99, _text),
    "position": ("text", 8, _position),
    "odd_one": ("text", 8, _odd_one),
    "tally": ("text", 6, _tally),
}
