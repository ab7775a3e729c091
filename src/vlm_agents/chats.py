"""Chats as Parquet, one a row: the columns, what makes a row sound, writing and reading.

`messages` are role and content, a picture's place marked by `<image>`; `images` are PNGs, in order. `prompt` and
`completion` say the same in parts, as TRL wants it; nothing here reads them. Knows nothing of where chats come from,
nor of any model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import pyarrow
import pyarrow.parquet

from vlm_agents.errors import DataError
from vlm_agents.files import sync, temporary_of, writing
from vlm_agents.marks import IMAGE_MARK
from vlm_agents.types import Role

CHAT_COLUMNS = ("messages", "images", "env", "seed", "turn")
TRL_COLUMNS = ("prompt", "completion", "images")
ROLES = get_args(Role)
AT_ONCE = 64  # rows that are read
GROUP_BYTES = 1 << 28  # of a row group's texts and pictures: readers hold a whole one, and most of them 2 GiB at most
ROW_BYTES = (1 << 31) - 1  # Arrow counts a column's bytes in 31 bits

_TEXT = {"dtype": "string", "_type": "Value"}
_PARTS = [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}]}]
# For `datasets`, in the one spelling that its versions 3, 4 and 5 know: a list of something is [something].
_FEATURES = {
    "messages": [{"role": _TEXT, "content": _TEXT}],
    "images": [{"_type": "Image"}],
    "env": _TEXT,
    "seed": {"dtype": "int64", "_type": "Value"},
    "turn": {"dtype": "int32", "_type": "Value"},
    "prompt": _PARTS,
    "completion": _PARTS,
}
_STRING = pyarrow.string()
_ARROW_PARTS = pyarrow.list_(
    pyarrow.struct({"role": _STRING, "content": pyarrow.list_(pyarrow.struct({"type": _STRING, "text": _STRING}))})
)
SCHEMA = pyarrow.schema(
    {
        "messages": pyarrow.list_(pyarrow.struct({"role": _STRING, "content": _STRING})),
        "images": pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": _STRING})),
        "env": _STRING,
        "seed": pyarrow.int64(),
        "turn": pyarrow.int32(),
        "prompt": _ARROW_PARTS,
        "completion": _ARROW_PARTS,
    }.items(),
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


FLAWS = ("no_chat", "mark_in_text", "half_character", "too_large")


class Flaw(NamedTuple):
    name: str  # of FLAWS, to count it by
    text: str  # what is wrong, for people


def flaw(row: dict[str, Any]) -> Flaw | None:
    """Why no model can take this row, made here or edited by hand; None where nothing speaks against it."""
    if problem := _no_chat(row["messages"], row["images"]):
        return Flaw("no_chat", problem)
    marks, pictures = sum(message["content"].count(IMAGE_MARK) for message in row["messages"]), len(row["images"])
    if marks != pictures:
        return Flaw("mark_in_text", f"it has {marks} {IMAGE_MARK} for {pictures} pictures; no word can be spelled so")
    for place, message in enumerate(row["messages"]):
        if message["role"] == "assistant" and IMAGE_MARK in message["content"]:
            return Flaw("mark_in_text", f"its message {place} is an assistant's, and has a picture")
    try:
        size = _bytes(row)
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        return Flaw("half_character", f"half a surrogate pair, {half}, in a text")
    if size > ROW_BYTES:
        return Flaw("too_large", f"{size:,} bytes of texts and pictures, more than a Parquet reader takes")
    return None


def _no_chat(messages: Any, images: Any) -> str | None:
    """What these columns lack that a chat has."""
    if images is None:
        return "its images are null: where there are none, that is an empty list"
    if not isinstance(messages, list) or not messages:
        return "it has no messages"
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"its message {place} lacks role or content"
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
            return f"its picture {place} is null, or not in the file: its bytes belong there"
    if not messages[-1]["content"].strip():
        return "its last message, which would be learned, is empty"
    return _disorder([message["role"] for message in messages])


def _disorder(roles: Sequence[str]) -> str | None:
    """What is wrong unless somebody asks and the assistant answers, at the end too, behind a system message or none."""
    if foreign := set(roles) - set(ROLES):
        return f"its role {min(foreign)!r} is none of {', '.join(ROLES)}"
    if roles[-1] != "assistant":
        return f"its last message is of role {roles[-1]}: what is learned is an assistant's message at the end"
    said = roles[roles[0] == "system" :]
    if said[0] != "user" or "system" in said or ("assistant", "assistant") in pairwise(said):
        return f"its roles are out of order ({', '.join(roles)}): system or nothing, then users, each answer behind one"
    return None


def digest(row: dict[str, Any]) -> bytes:
    """16 bytes that depend on the row's messages and pictures alone."""
    state = hashlib.blake2b(repr(row["messages"]).encode(), digest_size=16)
    for image in row["images"]:
        state.update(image["bytes"])
    return state.digest()


def in_parts(messages: Sequence[dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """The columns `prompt` and `completion`: all but the last message, and the last, each text or picture a part."""
    said = []
    for message in messages:
        first, *rest = ([{"type": "text", "text": text}] * bool(text) for text in message["content"].split(IMAGE_MARK))
        parts = [*first, *(part for text in rest for part in ({"type": "image"}, *text))]
        said.append({"role": message["role"], "content": parts})
    return {"prompt": said[:-1], "completion": said[-1:]}


class ChatWriter:
    """Writes rows to a file that appears when all of them are in it and read back right, or not at all.

    They are given without the columns that `in_parts` makes of them. A row group stores each of its
    distinct pictures once. A context manager: what wasn't published is gone after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary_of(path)
        self._file: pyarrow.parquet.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []  # not written yet
        self._size = 0  # of these, in bytes
        self._digests: list[bytes] = []  # of all rows

    def __len__(self) -> int:
        return len(self._digests)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # on a full disk it fails once more
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add(self, row: dict[str, Any], key: bytes) -> None:
        """A row without a flaw, and its digest."""
        size = _bytes(row)
        if self._rows and self._size + size > GROUP_BYTES:
            self._flush()
        self._rows.append(row)
        self._size += size
        self._digests.append(key)

    def publish(self) -> None:
        """Put the file into its place; without rows there is none, nor one from before. DataError if it is damaged."""
        if not self._digests:
            self.path.unlink(missing_ok=True)
            return
        self._flush()
        assert self._file is not None
        with writing(self.path):
            self._file.close()
            sync(self._temporary)
        if [digest(row) for row in read_chats(self._temporary)] != self._digests:
            raise DataError(f"{self.path} does not read back as it was written: give the same command again")
        with writing(self.path):
            os.replace(self._temporary, self.path)

    def _flush(self) -> None:
        # Not through `datasets`: it stores a picture anew in every row, and where the disk is full the process dies.
        # A dictionary page as large as needed stores each distinct picture of a row group once.
        with writing(self.path):
            if self._file is None:
                self._file = pyarrow.parquet.ParquetWriter(self._temporary, SCHEMA, dictionary_pagesize_limit=1 << 30)
            rows = [row | in_parts(row["messages"]) for row in self._rows]
            self._file.write_table(pyarrow.Table.from_pylist(rows, SCHEMA))
        self._rows, self._size = [], 0


def read_chats(path: Path) -> Iterator[dict[str, Any]]:
    """The columns messages and images of each row, few rows in memory at once: in one piece the pictures of a large
    file are more than Arrow can hold.

    DataError for a file that is missing, no Parquet, or without these columns; a row may have any `flaw`.
    """
    if not path.is_file():
        raise DataError(f"no {path}: it is written by stage=preprocess; run it first, or set stage.data")
    columns = ["messages", "images"]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if absent := set(columns) - set(file.schema_arrow.names):
                raise pyarrow.ArrowInvalid(f"it has no column {' or '.join(sorted(absent))}")
            for batch in file.iter_batches(AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable Parquet file of chats ({error}): run stage=preprocess again") from error


def _bytes(row: dict[str, Any]) -> int:
    """What the row takes where it is unpacked. UnicodeEncodeError for half a surrogate pair, which has no bytes."""
    texts = [row.get("env", ""), *2 * [message["content"] for message in row["messages"]]]  # as they are, and in parts
    return sum(len(text.encode()) for text in texts) + sum(len(image["bytes"]) for image in row["images"])
