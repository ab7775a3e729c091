"""Instruction data in LLaVA's layout, read into chats: a JSON list of records like

    {"image": "7/0.png",
     "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}

or, as PyVision's data has it, with `images`, and messages of `role` user or assistant and `content`.

A mark stands anywhere in a human turn, and its picture stays there (LLaVA's own code moves a single one to the front).
A picture lies inside the folder of pictures by its path; a link there may lead out of it, as whoever made the link
wanted.

Only reading: records that aren't sound are skipped, named and counted; what becomes of the rest is decided elsewhere.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlm_agents.errors import DataError, short
from vlm_agents.files import inside
from vlm_agents.marks import IMAGE_MARK, unmarked
from vlm_agents.pictures import Picture, read_picture
from vlm_agents.types import Message, Part, Prompt, Role

logger = logging.getLogger(__name__)

NAMED = 5  # broken records of a file; the others are counted
ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
ROLES |= {"user": "user", "assistant": "assistant"}


class Example(NamedTuple):
    """Something that gpt said, the `turn`-th time in the `record`-th record, and all that stood before it."""

    record: int
    turn: int
    prompt: Prompt
    answer: str


class BrokenRecord(Exception):
    """Says what is wrong with a record."""


def read_llava(path: Path, folder: Path, counts: Counter[str]) -> Iterator[Example]:
    """What gpt says in the records of a JSON file, one example each; the pictures lie under `folder`.

    Broken records are counted in `counts`, and logged at the end, the first of them by name. DataError for a file that
    is no list, or has no sound record.
    """
    problems: list[str] = []
    records = _load(path)
    counts["records_skipped"] += 0  # to be seen even where nothing was
    for index, record in enumerate(records):
        counts["records"] += 1
        try:
            messages = _messages(record, folder)
        except BrokenRecord as problem:
            counts["records_skipped"] += 1
            problems.append(f"record {index}: {problem}")
            continue
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        for turn, place in enumerate(answers):
            yield Example(index, turn, messages[:place], messages[place].text)
    if len(problems) == len(records):
        others = f", and so on, {len(problems)} in all" if len(problems) > 1 else ""
        raise DataError(
            f"{path} holds no sound record; {problems[0] if problems else 'it is empty'}{others}. "
            f"Set stage.images to the folder that its image paths start from (now {folder}), or mend the file"
        )
    for problem in problems[:NAMED]:
        logger.warning("%s, %s; skipped", path, problem)
    if more := problems[NAMED:]:
        logger.warning("%s, %d more records, to %s; skipped", path, len(more), more[-1])


def refuse_no_list(path: Path) -> None:
    """DataError where `path` can't be read, or holds no list, as its first bytes say: files may be large."""
    try:
        with open(path, "rb") as file:
            listed = file.read(1 << 12).lstrip().startswith(b"[")
    except OSError:
        listed = False
    if not listed:
        _load(path)  # says what is wrong


def _load(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"can't read {path} ({error}): stage.data names run directories and LLaVA files") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    if not isinstance(records, list):
        raise DataError(f"{path} is no list of records with image and conversations")
    return records


def _messages(record: Any, folder: Path) -> Prompt:
    """The whole conversation, pictures and all."""
    said = _field(record, "conversations", list)
    texts = [_field(turn, _spelled(turn, "value", "content"), str) for turn in said]
    roles: list[Role] = [_role(turn) for turn in said]
    if "assistant" not in roles:
        raise BrokenRecord("no gpt turn in conversations")
    if roles[0] == "assistant":
        raise BrokenRecord("conversations begin with a gpt turn")
    if any(IMAGE_MARK in text for role, text in zip(roles, texts, strict=True) if role != "user"):
        raise BrokenRecord(f"{IMAGE_MARK} outside of the human turns")
    key = _spelled(record, "image", "images")
    names = record[key] if isinstance(record.get(key), list) and record[key] else [_field(record, key, str)]
    if (marks := sum(text.count(IMAGE_MARK) for text in texts)) != len(names):
        raise BrokenRecord(f"{marks} {IMAGE_MARK} for {len(names)} pictures")
    pictures = iter([Picture(_image(folder, name)) for name in names])
    return tuple(Message(role, _trimmed(unmarked(text, pictures))) for role, text in zip(roles, texts, strict=True))


def _trimmed(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Without the space around all that is said, and without texts of nothing else, as between mark and mark."""
    kept = [part for part in parts if isinstance(part, Picture) or part.strip()] or [""]
    worded = [place for place, part in enumerate(kept) if isinstance(part, str)]
    for place, strip in ((worded[0], str.lstrip), (worded[-1], str.rstrip)) if worded else ():
        kept[place] = strip(str(kept[place]))
    return tuple(kept)


def _field(node: Any, key: str, kind: type) -> Any:
    """`node[key]`, which must be of this kind and not empty."""
    if not isinstance(node, dict) or key not in node:
        raise BrokenRecord(f"no {key} in {short(node)}")
    if not isinstance(node[key], kind) or not node[key]:
        raise BrokenRecord(f"{key} is {short(node[key])}")
    return node[key]


def _role(turn: dict[str, Any]) -> Role:
    key = _spelled(turn, "from", "role")
    speaker = _field(turn, key, str)
    if speaker not in ROLES:
        raise BrokenRecord(f"{key} is {short(speaker)}, not one of {', '.join(ROLES)}")
    return ROLES[speaker]


def _spelled(node: Any, usual: str, other: str) -> str:
    """The one of two names that the node has."""
    return other if isinstance(node, dict) and other in node and usual not in node else usual


def _image(folder: Path, name: Any) -> Image.Image:
    if not isinstance(name, str):
        raise BrokenRecord(f"can't read picture {short(name)} (its name is no text)")
    path = inside(folder, name)
    if path is None:
        raise BrokenRecord(
            f"picture {short(name)} lies outside of {os.path.abspath(folder)}: write its absolute path, and set "
            "stage.images to a folder above it"
        )
    try:
        return read_picture(path)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise BrokenRecord(f"no picture {path}") from error
        raise BrokenRecord(f"can't read picture {short(name)} ({error})") from error
