"""The expert of the scenes that `generator` makes: what to think, which Python to write, and the answer.

It knows where things lie, and writes no more than a look at the picture would tell. Its code asks for Pillow alone, and
for what a runtime of this kind gives: `image_clue_0`, the picture in its own size, and that `show()` shows it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vlm_agents.blocks import boxed, fenced
from vlm_agents.envs.visual_search.env import VisualSearch
from vlm_agents.envs.visual_search.question import Box
from vlm_agents.envs.visual_search.scene import LEGIBLE, Card, Scene, Shape
from vlm_agents.experts import NoExpert
from vlm_agents.seeds import stable_hash
from vlm_agents.types import Advice

ROUND = 10  # pixels that a box around a card is rounded to
FEW = 6  # things that are all named, where there are no more
SUMMARIES = {  # what is seen at last; {} is the answer
    "pattern": "The pattern on it is {}.",
    "digit": "The digit on it is {}.",
    "dots": "I count {} on it.",
    "text": "It reads {}.",
    "position": "So the answer is {}.",
    "odd_one": "The {} one is the odd one.",
    "tally": "I count {}.",
}


class Saying(NamedTuple):
    """One turn: a thought, and either code or the answer."""

    thought: str
    code: str = ""
    answer: str = ""

    @property
    def action(self) -> str:
        return fenced(self.code) if self.code else boxed(self.answer)


class VisualSearchExpert:
    """Plays what `solve` says: looks until all that matters was shown, then answers.

    NoExpert for questions that weren't made up, and where it couldn't see what it talks of.
    """

    def __init__(self, env: VisualSearch) -> None:
        cfg = env.cfg
        if cfg.files or cfg.picture_in == "runtime" or (cfg.tool and not cfg.max_pictures):
            raise NoExpert(
                "env=visual_search has an expert of made-up scenes alone, that are shown: of none of env.data"
            )
        self.env = env

    def start(self) -> Advice | None:
        scene = self.env.scene
        assert scene
        self.plan = solve(scene, self.env.side)[0 if self.env.cfg.tool else -1 :]
        return self._next()

    def follow(self, action: str | None) -> Advice | None:
        if self.plan and action == self.plan[0].action:
            self.plan = self.plan[1:]
        return self._next()

    def _next(self) -> Advice | None:
        return Advice(self.plan[0].thought, self.plan[0].action, len(self.plan)) if self.plan else None


class Guesser(VisualSearchExpert):
    """Answers at once, one of the options as the seed has it: how an agent plays that doesn't look, for demonstrations
    that are no better (`env.expert=vlm_agents.experts.visual_search:Guesser`). None where there are no options."""

    def start(self) -> Advice | None:
        scene = self.env.scene
        assert scene
        options = scene.options
        guesses = [options[stable_hash("guess", scene.seed) % len(options)]] if options else []
        self.plan = [Saying("I guess.", answer=guess) for guess in guesses]
        return self._next()


def solve(scene: Scene, side: int | None = None) -> list[Saying]:
    """The turns that answer a scene: a look at each card that matters, then the answer.

    `side`: the longer side in pixels that a picture is shown with; if None, the largest that hides the answer.
    """
    side = scene.hidden_up_to if side is None else side
    boxes = [view(scene, card, side) for card in scene.must_see]
    return [
        Saying(_whereabouts(scene), _code(boxes, side)),
        Saying(SUMMARIES[scene.category].format(scene.answer), answer=scene.answer),
    ]


def view(scene: Scene, card: Card, side: int) -> Box:
    """What to cut out so that the card's detail is seen with `side` pixels: its cell if that will do, for there are few
    cells; else the card and a little around it."""
    width, height = (length // scene.cells for length in scene.size)
    if scene.stroke * side / max(width, height) >= LEGIBLE:
        left, top = card.cell[0] * width, card.cell[1] * height
        return left, top, left + width, top + height
    left, top, right, bottom = card.box
    edge = (right - left) // 8
    return (
        max(0, (left - edge) // ROUND * ROUND),
        max(0, (top - edge) // ROUND * ROUND),
        min(scene.size[0], -(-(right + edge) // ROUND) * ROUND),
        min(scene.size[1], -(-(bottom + edge) // ROUND) * ROUND),
    )


def place(scene: Scene, thing: Card | Shape) -> str:
    """Where in the picture, in thirds: `(2,0)` is in the upper right corner."""
    column, row = ((thing.box[axis] + thing.box[axis + 2]) * 3 // (2 * scene.size[axis]) for axis in (0, 1))
    return f"({column},{row})"


def _whereabouts(scene: Scene) -> str:
    """What is seen from afar, and what of it is looked at."""
    if scene.category == "position":
        one, other = (f"the {card.detail} at {place(scene, card)}" for card in scene.must_see)
        return f"I look at two cards, {one} and {other}."
    card, *others = scene.must_see
    if others:
        return f"There are {len(scene.must_see)} cards. I look at each."
    there = f"The {card.color} card is at {place(scene, card)}."
    things = sorted((*scene.cards, *scene.shapes), key=lambda thing: thing.cell[::-1])
    if len(things) > FEW:
        return there
    kinds = (one.kind if isinstance(one, Shape) else "card" for one in things)
    named = (f"{one.color} {kind} {place(scene, one)}" for one, kind in zip(things, kinds, strict=True))
    return f"I see {', '.join(named)}. {there}"


def _code(boxes: Sequence[Box], side: int) -> str:
    """Shows each cut at `side` pixels on its longer side."""
    if len(boxes) == 1:
        return f"image_clue_0.crop({boxes[0]}).resize({_fitted(boxes[0], side)}).show()"
    pairs = "\n".join(f"    ({box}, {_fitted(box, side)})," for box in boxes)
    return f"for box, size in [\n{pairs}\n]:\n    image_clue_0.crop(box).resize(size).show()"


def _fitted(box: Box, side: int) -> tuple[int, int]:
    width, height = box[2] - box[0], box[3] - box[1]
    return round(width * side / max(width, height)), round(height * side / max(width, height))
