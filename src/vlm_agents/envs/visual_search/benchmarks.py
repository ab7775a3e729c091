"""Files to evaluate on: TSV as HR-Bench has it, JSON lines as V* has it.

Pictures are paths or base64 in the row; options are columns A, B, ..., a list, or lines of the question. A row's own
text is read again when its picture is called for.
"""

import base64
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm_agents.envs.visual_search.question import LETTERS, MOST_BYTES, Box, Question, load
from vlm_agents.envs.visual_search.rows import Broken, inside, mapping, optional, questions, refuse, text
from vlm_agents.errors import DataError, short
from vlm_agents.pictures import Picture

MOST_OF_ROW = 2 * MOST_BYTES
OPEN_QUOTE = re.compile(rb'(?:^|\t)"[^"]*(?:""[^"]*)*\Z')
FIELD = re.compile(r'(?:^|\t)(?:"([^"]*(?:""[^"]*)*)"(?=\t|\Z)|([^\t]*))')
OPTION = re.compile(r"\(?([A-Z])[).:]\s*(.+)")
HINT = re.compile(r"\n?Answer with the option's letter[^\n]*\Z", re.IGNORECASE)


class Place(NamedTuple):
    """Where a row begins in its file, and what its columns are called if the row doesn't say."""

    path: Path
    offset: int
    header: tuple[str, ...] | None


def read_benchmark(path: Path, folder: Path | None = None, broken: Broken = refuse) -> Iterator[Question]:
    """The questions of a `.tsv`, or of JSON lines. Pictures' paths start from `folder`, by default the file's own.

    DataError for a file that can't be read, and to `broken` one for each row.
    """
    folder = path.parent if folder is None else folder
    known: dict[str, Place] = {}  # by index: a row may name another's in place of its picture

    def read(found: tuple[Place, bytes], where: str) -> Question:
        place, line = found
        row = _parsed(line, place.header)
        ident = text({**row, "where": where}, "index", "question_id", "id", "where")
        picture, boxes = _source(row, ident, place, folder, known, where)
        question, options = _options(row)
        return Question(
            ident=ident,
            text=question,
            pictures=(picture,),
            answer=_answer(text(row, "answer", "label"), options),
            options=options,
            category=optional(row, "category"),
            source=path.stem,
            boxes=boxes,
        )

    return questions(path, _lines(path), read, broken)


# ---- rows ------------------------------------------------------------------------------------------------------------
def _lines(path: Path) -> Iterator[tuple[Place, bytes]]:
    try:
        with open(path, "rb") as file:
            header = _header(file, path) if path.suffix == ".tsv" else None
            while True:
                offset = file.tell()
                line = _line(file, header is not None)
                if not line:
                    return
                if line.strip():
                    yield Place(path, offset, header), line
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}. Name a file of questions, .tsv or .jsonl") from error


def _header(file: BinaryIO, path: Path) -> tuple[str, ...]:
    names = tuple(_fields(file.readline(1 << 16).decode("utf-8-sig", "replace")))
    if not {"question", "answer"} <= set(names):
        raise DataError(
            f"{path} begins with {short(names)}: a row with the names question, answer, image belongs there"
        )
    return names


def _line(file: BinaryIO, tabs: bool) -> bytes:
    """One row; a quoted field of a TSV may hold line ends."""
    line = more = file.readline(MOST_OF_ROW)
    while more and tabs and OPEN_QUOTE.search(line) and len(line) < MOST_OF_ROW:
        line += (more := file.readline(MOST_OF_ROW))
    if len(line) >= MOST_OF_ROW:
        raise DataError(f"a row of {file.name} has more than {MOST_OF_ROW:,} bytes: save its picture smaller")
    return line


def _parsed(line: bytes, header: tuple[str, ...] | None) -> dict[str, Any]:
    try:
        words = line.decode("utf-8-sig")
        row = json.loads(words) if header is None else {}
    except (ValueError, RecursionError) as error:
        what = "JSON" if header is None else "UTF-8"
        raise DataError(f"it is not {what} ({short(str(error))}): mend it, or remove the row") from error
    if header is None:
        return mapping(row, "the row")
    fields = _fields(words)
    if len(fields) != len(header):
        raise DataError(f"it has {len(fields)} fields for {len(header)} columns: mend it, or remove the row")
    return dict(zip(header, fields, strict=True))


def _fields(words: str) -> list[str]:
    found = FIELD.finditer(words.rstrip("\r\n"))
    return [one[2] if one[1] is None else one[1].replace('""', '"') for one in found]


# ---- pictures --------------------------------------------------------------------------------------------------------
def _source(
    row: dict[str, Any], ident: str, place: Place, folder: Path, known: dict[str, Place], where: str
) -> tuple[partial[Picture], tuple[Box, ...]]:
    """How to load a row's picture, and the boxes that a file beside it names."""
    path = row.get("image_path")
    image = path or text(row, "image")
    if path or ("." in image[:512] and not image.startswith("data:")):  # base64 has no dots
        file = inside(folder, image)
        return partial(load, file, where), _boxes(file)
    if len(image) < 64:
        if image not in known:
            raise DataError(
                f"image is {short(image)}, no path, no base64, and no row before: mend it, or remove the row"
            )
        place = known[image]
    known[ident] = place
    return partial(_embedded, place, where), ()


def _embedded(place: Place, where: str) -> Picture:
    try:
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            row = _parsed(_line(file, place.header is not None), place.header)
        return load(_decoded(text(row, "image")), where)
    except OSError as error:
        raise DataError(f"{where}: can't read the file ({error.strerror}): put it back") from error
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error


def _decoded(image: str) -> bytes:
    try:
        return base64.b64decode(image.rpartition(",")[2], validate=True)
    except ValueError as error:
        raise DataError(f"its image is no base64 ({error}): mend it, or remove the row") from error


def _boxes(picture: Path) -> tuple[Box, ...]:
    """Of V*: a JSON file beside the picture lists them as left, top, width, height."""
    file = picture.with_suffix(".json")
    if not file.is_file():
        return ()
    try:
        boxes = [[int(number) for number in box] for box in json.loads(file.read_bytes())["bbox"]]
        return tuple((left, top, left + width, top + height) for left, top, width, height in boxes)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{file} has no bbox of boxes of four numbers: mend or remove it") from error


# ---- options ---------------------------------------------------------------------------------------------------------
def _options(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The question without its options, and they."""
    question = HINT.sub("", text(row, "question", "text")).strip()
    if isinstance(row.get("options"), list):
        listed = tuple(text({"an option": option}, "an option") for option in row["options"])
        return question, _different(listed)
    columns = [option if (option := optional(row, letter)) != "nan" else "" for letter in LETTERS]
    if any(columns):
        there = tuple(option for option in columns if option)
        if there != tuple(columns[: len(there)]):  # letters would name others than the answer means
            raise DataError(f"a column of its options {short(there)} is empty before another: mend or remove the row")
        return question, _different(there)
    lines = question.split("\n")
    matches = [OPTION.fullmatch(line.strip()) for line in lines]
    first = next((place for place, match in enumerate(matches) if match and match[1] == "A"), None)
    if first is None or first == 0:
        return question, ()
    options = []
    for line, match in zip(lines[first:], matches[first:], strict=True):
        if match and match[1] == LETTERS[len(options) : len(options) + 1]:
            options.append(match[2])
        elif line.strip():
            raise DataError(f"{short(line)} stands among its options and is none: give each a line, or remove the row")
    return "\n".join(lines[:first]).strip(), _different(tuple(options))


def _different(options: tuple[str, ...]) -> tuple[str, ...]:
    if len(options) < 2 or len(set(options)) < len(options) or len(options) > len(LETTERS):
        raise DataError(f"its options are {short(options)}: give two or more that differ, or remove the row")
    return options


def _answer(answer: str, options: tuple[str, ...]) -> str:
    """The right option, which may be named by its letter, even where another option's text is that letter."""
    letter = answer.strip("(). ")
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return options[LETTERS.index(letter)]
    if not options or answer in options:
        return answer
    raise DataError(f"the answer {short(answer)} is none of {short(options)}: mend it, or remove the row")
