"""Episodes on disk: `episodes.jsonl`, one line a trajectory, and `images/<key>.png`, one file a distinct frame.

The only file that knows this layout (`upgrades` knows earlier ones); the dataclasses of `types` are its schema, and a
picture is `{"picture": "<key>"}`. Each line says its version and can be read alone. An episode counts once its line
ends in a newline, and its images are in place before that. It knows nothing of stages, or of what episodes are for.
"""

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from weakref import WeakValueDictionary

from PIL import Image

from vlm_agents.errors import DataError
from vlm_agents.files import append_line, atomic_write, sync, writing
from vlm_agents.pictures import Picture, opened
from vlm_agents.types import Trajectory
from vlm_agents.upgrades import VERSION, upgraded
from vlm_agents.world import ALONE, World

logger = logging.getLogger(__name__)

LINES = "episodes.jsonl"
IMAGES = "images"
SYNC_EVERY = 1000  # pictures
BLANK = Picture(Image.new("RGB", (1, 1)))
NAME = re.compile("[0-9a-f]{16}")  # of an image: no line can name a file of another folder
# What JSON has for a plain type, and how large a number may be.
PLAIN: dict[type, tuple[set[type], float | None]] = {
    str: ({str}, None),
    bool: ({bool}, None),
    int: ({int}, 2**63 - 1),
    float: ({float, int}, sys.float_info.max),
}


class EpisodeWriter:
    """Appends to the episodes of a run directory; one writer at a time.

    Opening drops what a crash left of an unfinished line, and, `anew`, every earlier episode. (A run that goes back to
    a checkpoint cuts the file itself, see `Run.append_only`.) Of several ranks, who all have the same episodes, the
    first alone writes them.
    """

    def __init__(self, run_dir: Path, anew: bool = False, world: World = ALONE) -> None:
        self._writes = world.main
        self._lines = run_dir / LINES
        self._images = run_dir / IMAGES
        with writing(self._images):
            self._images.mkdir(parents=True, exist_ok=True)
        with writing(self._lines):
            self._lines.touch()
            self._cut(anew)
        # one that a crash of the machine left empty is written again
        self._known = {path.stem for path in self._images.glob("*.png") if path.stat().st_size}
        self._waiting: list[Path] = []  # pictures that the disk may not hold yet

    def append(self, *trajectories: Trajectory) -> None:
        """Write episodes, each whole or not at all; DataError when the disk is full. They then survive this process."""
        for trajectory in trajectories if self._writes else ():
            line = {"version": VERSION, **self._encode(trajectory)}
            append_line(self._lines, json.dumps(line, default=self._encode, allow_nan=False))
        if len(self._waiting) > SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Have the disk hold every episode written so far: they then survive a crash of the machine."""
        while self._waiting:
            sync(self._waiting.pop())
        sync(self._images)
        sync(self._lines)

    def _cut(self, anew: bool) -> None:
        with open(self._lines, "r+b") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
            unfinished = file.tell() - whole
            if unfinished:
                logger.warning("%s: dropped %d bytes of an unfinished last line", self._lines, unfinished)
            file.truncate(0 if anew else whole)

    def _encode(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Picture):
            self._save(value)
            return {"picture": value.key}
        return {field.name: getattr(value, field.name) for field in fields(value)}

    def _save(self, picture: Picture) -> None:
        if picture.key not in self._known:
            png = io.BytesIO()
            picture.image.save(png, "PNG", compress_level=1)
            path = self._images / f"{picture.key}.png"
            atomic_write(path, png.getvalue(), durable=False)
            self._known.add(picture.key)
            self._waiting.append(path)


def read_episodes(run_dir: Path, pictures: bool = True, skip_damaged: bool = False) -> Iterator[Trajectory]:
    """The episodes of a run directory, one at a time. Equal frames are one image object while anybody holds it.

    Without `pictures`, every frame is one and the same blank: decoding the files is most of the time. `skip_damaged`
    is for who only shows them: a line that is no episode is then left out with a warning.
    """
    load = _Images(run_dir / IMAGES) if pictures else lambda name: BLANK
    for line, where in _lines(run_dir / LINES):
        try:
            with _reading(where):
                episode = _decode(Trajectory, upgraded(json.loads(line)), load)
        except DataError as error:
            if not skip_damaged:
                raise
            logger.warning("left out: %s", error)
            continue
        yield episode


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Each whole line, and what to call it in an error."""
    if not path.is_file():
        raise DataError(f"no {path}: it is written by stage=collect, ppo and eval, and none of them has run there")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("%s:%d: skipped an unfinished last line", path, number)
                return
            yield line, f"{path}:{number}"


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever a line that is no episode raises into a DataError that names the line."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{where}: not an episode ({error!r}). Delete this line, and DONE beside the file: stage=collect then "
            "plays what lacks"
        ) from error


class _Images:
    """Loads the images of one folder by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._alive: WeakValueDictionary[str, Picture] = WeakValueDictionary()

    def __call__(self, name: str) -> Picture:
        image = self._alive.get(name)
        if image is None:
            image = self._alive[name] = self._open(self._folder / f"{name}.png")
        return image

    def _open(self, path: Path) -> Picture:
        try:
            with opened(path) as file:
                return Picture(file.copy())
        except DataError as error:
            raise DataError(
                f"can't read image {path} ({error}). Put it back, or delete this line of the episodes"
            ) from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode(kind: Any, value: Any, load: Callable[[str], Picture]) -> Any:
    """The JSON `value` as the type that it was written from; TypeError or ValueError where it is none.

    Fields that it lacks take their default.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None and NoneType in inner:
            return None
        picture = Picture in inner and isinstance(value, dict)
        return _decode(Picture if picture else inner[0], value, load)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], item, load) for name, item in value.items()})
    if origin is tuple and inner[0] not in PLAIN and isinstance(value, list):
        return tuple(_decode(inner[0], item, load) for item in value)
    if kind is Picture and isinstance(value, dict) and list(value) == ["picture"]:
        if not (isinstance(value["picture"], str) and NAME.fullmatch(value["picture"])):
            raise ValueError(f"{value['picture']!r:.60} names no image: such a name is 16 hex digits")
        return load(value["picture"])
    if _fits(kind, value):
        return tuple(value) if origin is tuple else value
    raise TypeError(f"{value!r:.60} is no {getattr(kind, '__name__', kind)}")


def _fits(kind: Any, value: Any) -> bool:
    """Is a JSON value of this plain type, or made of it? Numbers must be finite, and integers have 64 bits at most."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin is Mapping:
        return isinstance(value, dict) and _fits(tuple[inner[1], ...], list(value.values()))
    if origin is not tuple:
        return kind in PLAIN and _fits(tuple[kind, ...], [value])
    if not isinstance(value, list) or (inner[1] is not ... and len(value) != len(inner)):
        return False
    types, most = PLAIN[inner[0]]
    return set(map(type, value)) <= types and (most is None or all(abs(number) <= most for number in value))
