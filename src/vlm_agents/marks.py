"""A message as one text, with `<image>` where a picture stands: how data files write it."""

from collections.abc import Iterator, Sequence

from vlm_agents.pictures import Picture
from vlm_agents.types import Part

IMAGE_MARK = "<image>"


def marked(parts: Sequence[Part]) -> str:
    return "".join(IMAGE_MARK if isinstance(part, Picture) else part for part in parts)


def unmarked(text: str, pictures: Iterator[Picture]) -> tuple[Part, ...]:
    """The parts of a marked text, a picture of `pictures` for each mark; no part is an empty text but the only one."""
    first, *rest = text.split(IMAGE_MARK)
    parts: list[Part] = [first]
    for piece in rest:
        parts += [next(pictures), piece]
    return tuple(part for part in parts if part != "") or ("",)
