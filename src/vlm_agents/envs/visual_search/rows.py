"""What the readers of others' files share: rows one by one, an error for each that is broken, and paths that stay where
they belong."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vlm_agents import files
from vlm_agents.envs.visual_search.question import Question
from vlm_agents.errors import DataError, short

Row = TypeVar("Row")
Broken = Callable[[DataError], None]  # is told of each broken row, which is then left out


def refuse(error: DataError) -> None:
    """Ends the reading at the first broken row."""
    raise error


def place_of(path: Path, number: int) -> str:
    """How an error names a row; the first has the number 0."""
    return f"{path}, row {number}"


def questions(
    path: Path, rows: Iterable[Row], read: Callable[[Row, str], Question], broken: Broken
) -> Iterator[Question]:
    """`read(row, where)` of each row; what it raises goes to `broken`, with file and row before it."""
    for number, row in enumerate(rows):
        where = place_of(path, number)
        try:
            question = read(row, where)
        except DataError as error:
            broken(DataError(f"{where}: {error}"))
        else:
            yield question


def mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name} is {short(value)}: make it an object of named fields, or remove the row")
    return value


def text(row: dict[str, Any], *names: str) -> str:
    """The first field of these names that is there and neither null nor empty, a text or a number."""
    for name in names:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise DataError(f"{name} is {short(value)}: make it a text, or remove the row")
        if value is not None and str(value).strip():
            return whole(str(value).strip(), name)
    raise DataError(f"no {' or '.join(names)}: write it, or remove the row")


def whole(words: str, name: str) -> str:
    """The same. DataError for half a surrogate pair, which no file could be written with."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has half a character, {short(words)}: mend it, or remove the row") from error
    return words


def optional(row: dict[str, Any], name: str) -> str:
    """The field, or an empty text where it is missing."""
    return "" if row.get(name) is None or not str(row[name]).strip() else text(row, name)


def inside(folder: Path, name: Any) -> Path:
    """The file of that name in the folder. A link there may lead out of it, as whoever made the link wanted."""
    if not isinstance(name, str):
        raise DataError(f"the picture's path is {short(name)}: make it a text, or remove the row")
    path = files.inside(folder, name)
    if path is None:
        raise DataError(
            f"the picture {short(name)} lies outside of {os.path.abspath(folder)}: name a folder above it "
            "(env.pictures), or remove the row"
        )
    if not os.path.isfile(path):
        raise DataError(
            f"no picture {short(name)} in {folder}: put it there, or name the folder that paths start from "
            "(env.pictures)"
        )
    return path
