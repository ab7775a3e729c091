"""What a person looks at: captioned frames, an episode as a GIF, and one self-contained HTML page per run.

This only draws. Which metrics, curves and episodes are shown is the stage's choice; nothing here plays, scores or
reads a run directory. The page itself is the package's `report.html` and `report.js`, which find all in one JSON block.
"""

import base64
import hashlib
import io
import json
import logging
import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import islice, pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_agents.errors import DataError
from vlm_agents.files import atomic_write
from vlm_agents.pictures import as_shown
from vlm_agents.types import Observation, Parsed, Prompt, Trajectory, Turn

log = logging.getLogger(__name__)

Size = tuple[int, int]
Curves = dict[str, list[tuple[float, float]]]

PAPER, INK, MUTED, GOOD, BAD, ACCENT = "#ffffff", "#1b1e25", "#5f6675", "#17734a", "#bd2c27", "#2f52c8"
MARGIN, CAPTION_WIDTH, CAPTION_HEIGHT = 16, 304, 224
SMALL_SIDE, LARGE_SIDE = 336, 640  # smaller pictures are enlarged towards the first, larger ones shrunk to the second
FRAME_MS, LAST_FRAME_MS = 500, 2000


# ---- pictures ------------------------------------------------------------------------------------------------------
def captioned_frame(turn: Turn, index: int, box: Size | None = None) -> Image.Image:
    """What the policy saw at turn `index` (from 0), beside what it thought, did and got.

    `box` is the room for the picture in pixels, by default as much as this picture takes: give one box to all frames
    of an episode to have canvases of one size.
    """
    start, end = turn.parsed.thought_span or (0, len(turn.reply.text))
    action, error = turn.parsed.action, turn.parsed.error
    facts = f"reward {_signed(turn.step.reward)}"
    if turn.reply.value is not None:
        facts += f"     value {_signed(turn.reply.value)}"
    return _compose(
        _picture(turn.observation),
        box,
        heading=f"turn {index + 1}",
        body=turn.reply.text[start:end],
        verdict=(action or "no legal action") + (f": {error}" if error else ""),
        colour=BAD if action is None else ACCENT,
        facts=facts,
    )


def episode_gif(trajectory: Trajectory, path: Path) -> None:
    """Write the episode as a looping GIF of two turns a second, closed by a frame that tells the outcome."""
    pictures = [_picture(observation) for observation in _observations(trajectory)] or [_text_picture("no turn")]
    box = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    frames = [captioned_frame(turn, index, box) for index, turn in enumerate(trajectory.turns)]
    outcome = _compose(
        pictures[-1],
        box,
        heading=f"{trajectory.env}   seed {trajectory.seed}",
        body=trajectory.error or f"policy: {trajectory.policy}",
        verdict=trajectory.stop.replace("_", " "),
        colour=GOOD if trajectory.success else BAD,
        facts=f"{len(frames)} turns     return {_signed(trajectory.total_reward)}",
    )
    method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE  # the smallest files of the methods, and the fastest
    first, *others = [frame.quantize(128, method, dither=dither) for frame in [*frames, outcome]]
    durations = [FRAME_MS] * len(frames) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    atomic_write(path, buffer.getvalue())


def _observations(trajectory: Trajectory) -> list[Observation]:
    """What was seen before each turn and after the last."""
    return [turn.observation for turn in trajectory.turns] + [turn.step.observation for turn in trajectory.turns[-1:]]


def _picture(observation: Observation) -> Image.Image:
    """The observation's images in a row, or its text where it has none, at a size that can be looked at."""
    if not observation.images:
        return _text_picture(observation.text)
    images = [as_shown(image) for image in observation.images]
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    row.thumbnail((LARGE_SIDE, LARGE_SIDE))
    scale = max(1, SMALL_SIDE // max(row.size))
    return row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)


def _text_picture(text: str) -> Image.Image:
    picture = Image.new("RGB", (SMALL_SIDE, SMALL_SIDE), PAPER)
    lines = (line for paragraph in text.splitlines() for line in _wrap(paragraph, 15))
    _write(ImageDraw.Draw(picture), (MARGIN, MARGIN), lines, 15, INK, CAPTION_WIDTH)
    return picture


def _compose(
    picture: Image.Image, box: Size | None, *, heading: str, body: str, verdict: str, colour: str, facts: str
) -> Image.Image:
    """The picture at the left, centred in its box; at the right the texts, of which the body is cut to what fits."""
    width, height = box or picture.size
    height = max(height, CAPTION_HEIGHT)
    canvas = Image.new("RGB", (width + CAPTION_WIDTH + 3 * MARGIN, height + 2 * MARGIN), PAPER)
    canvas.paste(picture, (MARGIN + (width - picture.width) // 2, MARGIN + (height - picture.height) // 2))
    draw = ImageDraw.Draw(canvas)
    left, bottom = width + 2 * MARGIN, MARGIN + height
    draw.text((left, MARGIN), heading[:CAPTION_WIDTH], MUTED, _font(13))
    draw.text((left, bottom), facts, MUTED, _font(13), anchor="ld")
    verdict_lines = list(islice(_wrap(verdict, 18), 4))
    verdict_top = bottom - 28 - 24 * len(verdict_lines)
    draw.rectangle((left, verdict_top - 10, left + 32, verdict_top - 8), colour)
    _write(draw, (left, verdict_top), iter(verdict_lines), 18, colour, 24 * len(verdict_lines))
    _write(draw, (left, MARGIN + 24), _wrap(body, 15), 15, INK, verdict_top - MARGIN - 24 - 14)
    return canvas


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Iterator[str], size: int, colour: str, height: int
) -> None:
    """Write as many lines as fit into `height`; an ellipsis tells that some were left out."""
    pitch = size * 4 // 3
    shown = list(islice(lines, height // pitch))
    if shown and next(lines, None) is not None:
        shown[-1] = shown[-1][:-3] + "..."
    for row, line in enumerate(shown):
        draw.text((at[0], at[1] + row * pitch), line, colour, _font(size))


def _wrap(text: str, size: int) -> Iterator[str]:
    """Break text into lines of the caption's width, between words where it can, inside a word that is too long.

    Only what is asked for is measured, and no more than a character a pixel at once: texts may be of any length.
    """
    measure = _font(size).getlength
    line = ""
    for word in text.split():
        if len(word) <= CAPTION_WIDTH and measure(f"{line} {word}") <= CAPTION_WIDTH:
            line = f"{line} {word}".lstrip()
            continue
        if line:
            yield line
        line = word
        while len(line) > CAPTION_WIDTH or measure(line) > CAPTION_WIDTH:
            prefixes = range(1, min(len(line), CAPTION_WIDTH))
            fit = max(1, bisect(prefixes, CAPTION_WIDTH, key=lambda end, line=line: measure(line[:end])))
            yield line[:fit]
            line = line[fit:]
    if line:
        yield line


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


# ---- the page ------------------------------------------------------------------------------------------------------
def read_curves(path: Path, keys: Iterable[str]) -> Curves:
    """The (step, value) points of each key in a `metrics.jsonl`, in the file's order; never logged, or null: left out.

    A line that somebody damaged is skipped with a warning: a picture of the rest is better than none.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: every stage writes it, so look for its folder's name")
    curves: Curves = {key: [] for key in keys}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            points = {key: (record["step"] + 0, record[key] + 0) for key in curves if record.get(key) is not None}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning('%s, line %d is not {"step": ..., metrics}: left out of the curves', path, number)
            continue
        for key, point in points.items():
            curves[key].append(point)
    return {key: points for key, points in curves.items() if points}


def write_report(
    path: Path,
    *,
    title: str,
    subtitle: str,
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    episodes: Sequence[Trajectory],
    table: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write one HTML file that needs nothing else: metrics as cards, a table, curves, and a player of the episodes.

    A table cell spelled `0.95 [0.91, 0.97]` is also drawn as an interval between 0 and 1.
    """
    pool = _Pool()
    columns = list(dict.fromkeys(column for row in table for column in row))
    data = {
        "title": title,
        "subtitle": subtitle,
        "metrics": [(name, _finite(value)) for name, value in metrics.items()],
        "columns": columns,
        "rows": [[row.get(column, "") for column in columns] for row in table],
        "curves": [
            (name, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
            for name, points in curves.items()
        ],
        "episodes": [_episode(trajectory, pool) for trajectory in episodes],
        "images": pool.images,
        "messages": pool.messages,
    }
    # Plain ASCII, and no "<" at all: whatever a model wrote, it can't close the script element that holds it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page, script = (_resource(name) for name in ("report.html", "report.js"))
    atomic_write(path, page.replace("{{script}}", script).replace("{{data}}", text))


def _resource(name: str) -> str:
    return resources.files("vlm_agents").joinpath(name).read_text(encoding="utf-8")


class _Pool:
    """The images and messages of a page: each distinct one is embedded once and referred to by its index."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int, int]] = []  # data URL, width, height
        self.messages: list[tuple[str, str, list[int]]] = []  # role, text, images
        self._index: dict[object, int] = {}
        self._places: dict[int, int] = {}  # by the identity of images that the episodes hold

    def add_images(self, images: Sequence[Image.Image]) -> list[int]:
        for image in images:
            if id(image) not in self._places:  # a frame comes back in every later prompt: look at it once
                self._places[id(image)] = self._add_image(as_shown(image))
        return [self._places[id(image)] for image in images]

    def _add_image(self, image: Image.Image) -> int:
        key = image.size, hashlib.sha256(image.tobytes()).digest()
        if key not in self._index:
            self._index[key] = len(self.images)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            self.images.append((url, *image.size))
        return self._index[key]

    def add_messages(self, prompt: Prompt) -> list[int]:
        indices = []
        for message in prompt:
            images = self.add_images(message.images)
            key = message.role, message.text, tuple(images)
            if key not in self._index:
                self._index[key] = len(self.messages)
                self.messages.append((message.role, message.text, images))
            indices.append(self._index[key])
        return indices


def _episode(trajectory: Trajectory, pool: _Pool) -> dict[str, object]:
    return {
        "env": trajectory.env,
        "seed": str(trajectory.seed),  # a 64-bit seed is more than a JavaScript number holds
        "policy": trajectory.policy,
        "stop": trajectory.stop,
        "error": trajectory.error,
        "return": _finite(trajectory.total_reward),
        "turns": [_turn(turn, pool) for turn in trajectory.turns],
        "seen": [(pool.add_images(seen.images), seen.text) for seen in _observations(trajectory)],
    }


def _turn(turn: Turn, pool: _Pool) -> dict[str, object]:
    advice = turn.observation.advice
    return {
        "prompt": pool.add_messages(turn.prompt),
        "reply": _pieces(turn.reply.text, turn.parsed),
        "finish": turn.reply.finish,
        "action": turn.parsed.action,
        "error": turn.parsed.error,
        "expert": advice.action if advice else None,
        "reward": _finite(turn.step.reward),
        "value": _finite(turn.reply.value),
        "metrics": [(name, _finite(value)) for name, value in turn.step.metrics.items()],
    }


def _pieces(text: str, parsed: Parsed) -> list[tuple[str, str]]:
    """The reply cut into (kind, text), kind being thought, action or empty.

    Cut here, because the spans count characters and JavaScript counts UTF-16 units.
    """
    spans = [("action", parsed.action_span or (0, 0)), ("thought", parsed.thought_span or (0, 0))]
    cuts = sorted({0, len(text), *(end for _, span in spans for end in span)})
    return [
        (next((kind for kind, (first, last) in spans if first <= start and end <= last), ""), text[start:end])
        for start, end in pairwise(cuts)
    ]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
