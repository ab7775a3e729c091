"""A question on pictures, wherever it came from, and the limits that hold for pictures from outside.

Pictures are loaded when they are called for: a set holds more of them than memory does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_agents.errors import DataError
from vlm_agents.pictures import Picture, opened, read_picture

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two just outside
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_BYTES = 1 << 26  # 64 MiB of a picture's file
MOST_PIXELS = 1 << 26  # a picture of 8K has half of that


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` is one of the `options` where there are any. `boxes`: what must be seen, in the first picture."""

    ident: str
    text: str
    pictures: tuple[Callable[[], Picture], ...]
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""
    source: str = ""
    boxes: tuple[Box, ...] = ()

    @property
    def asked(self) -> str:
        """The question, with its options by letter below it."""
        lines = (f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return "\n".join([self.text, *lines])


def load(source: Path | bytes, where: str) -> Picture:
    """The picture in a file or in its bytes. DataError, beginning with `where`, for one that is broken or too large."""
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read: save it smaller")
        with opened(source) as file:
            width, height = file.size
        if width * height > MOST_PIXELS:
            raise DataError(f"it is {width}x{height}, and at most {MOST_PIXELS:,} pixels are read: save it smaller")
        return Picture(read_picture(source))
    except (DataError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: can't read the picture ({reason}). Mend it, or remove the row") from error
