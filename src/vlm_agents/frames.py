"""What a turn looks like: captioned frames, and an episode as a GIF. Only draws; the page is in `report`."""

import io
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_agents.files import atomic_write
from vlm_agents.types import Observation, Trajectory, Turn

Size = tuple[int, int]

PAPER, INK, MUTED, GOOD, BAD, ACCENT = "#ffffff", "#1b1e25", "#5f6675", "#17734a", "#bd2c27", "#2f52c8"
MARGIN, CAPTION_WIDTH, CAPTION_HEIGHT = 16, 304, 224
SMALL_SIDE, LARGE_SIDE = 336, 640  # smaller pictures are enlarged towards the first, larger ones shrunk to the second
FRAME_MS, LAST_FRAME_MS = 500, 2000


def captioned_frame(turn: Turn, index: int, box: Size | None = None) -> Image.Image:
    """What the policy saw at turn `index` (from 0), beside what it thought, did and got.

    `box` is the room for the picture in pixels, by default as much as this picture takes: give one box to all frames
    of an episode to have canvases of one size.
    """
    start, end = turn.parsed.thought_span or (0, len(turn.reply.text))
    action, error = turn.parsed.action, turn.parsed.error
    facts = f"reward {_signed(turn.reward)}"
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
    pictures = [_picture(observation) for observation in observations(trajectory)] or [_text_picture("no turn")]
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


def observations(trajectory: Trajectory) -> list[Observation]:
    """What was seen before each turn and after the last."""
    return [turn.observation for turn in trajectory.turns] + [turn.step.observation for turn in trajectory.turns[-1:]]


def _picture(observation: Observation) -> Image.Image:
    """The observation's images in a row, or its text where it has none, at a size that can be looked at."""
    if not observation.images:
        return _text_picture(observation.text)
    images = [picture.image.copy() for picture in observation.images]
    for image in images:
        image.thumbnail((LARGE_SIDE, LARGE_SIDE))
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
