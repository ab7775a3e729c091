"""The chats of stage=preprocess as rows to train on: read from Parquet, and all checked before the first is used."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from torch.utils.data import Dataset

from vlm_agents.errors import DataError
from vlm_agents.models.rendering import HFRenderer
from vlm_agents.pictures import read_picture
from vlm_agents.stages.preprocess import IMAGE_MARK
from vlm_agents.tensors import Row
from vlm_agents.types import Message, Role

logger = logging.getLogger(__name__)

AT_ONCE = 64  # records; in one piece the pictures of a large file are more than Arrow can hold
NAMED = 3  # bad rows in an error; the others are counted


@dataclass(frozen=True, slots=True)
class Chat:
    """A record as it stands in the file: what was said, and the pictures' bytes in the order of their marks."""

    prompt: tuple[tuple[Role, str], ...]
    answer: str
    pictures: tuple[bytes, ...]


class Chats(Dataset[Row]):
    """The chats of a file, without their oldest turns where they are longer than `max_prompt_tokens`, or than the model
    has positions for.

    DataError where the file can't be read. What is wrong with a single row, `problems` says.
    """

    def __init__(self, path: Path, renderer: HFRenderer, max_prompt_tokens: int | None = None) -> None:
        self.path = path
        self.renderer = renderer
        self.max_prompt_tokens = max_prompt_tokens
        self.records = read_records(path)
        self.used = list(range(len(self.records)))  # the row in the file of each row of this dataset

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> Row:
        return self._row(self.used[index], read_picture)

    def _row(self, number: int, see: Callable[[bytes], Image.Image]) -> Row:
        """The row in place `number` of the file, its pictures as `see` has them."""
        chat = self.records[number]
        if isinstance(chat, DataError):
            raise chat
        images = iter([see(picture) for picture in chat.pictures])
        prompt = tuple(
            Message(role, text.replace(IMAGE_MARK, ""), tuple(next(images) for _ in range(text.count(IMAGE_MARK))))
            for role, text in chat.prompt
        )
        reply = self.renderer.encode_reply(chat.answer)
        if self.renderer.vocabulary.reserved & set(reply[:-1]):
            raise DataError("its answer has characters that the model's tokenizer has no token for")
        rendered = self.renderer.render(self.renderer.fit(prompt, self.max_prompt_tokens, len(reply)))
        start, nothing = len(rendered.ids), np.zeros(0, dtype=np.float32)
        ids = np.concatenate([rendered.ids, np.array(reply, dtype=np.int64)])
        return Row(f"{self.path}:{number}", ids, rendered.images, ((start, len(ids)),), *[nothing] * 5)

    def problems(self) -> dict[int, str]:
        """What is wrong with each row that can't be trained on, by its number in the file.

        Every distinct picture is decoded once; rows are then rendered with blank ones of its size.
        """
        sizes: dict[bytes, tuple[int, int]] = {}

        def blank(picture: bytes) -> Image.Image:
            if picture not in sizes:
                try:
                    sizes[picture] = read_picture(picture).size
                except DataError as error:
                    raise DataError(f"one of its pictures can't be read ({error})") from error
            return Image.new("1", sizes[picture])

        found = {}
        for number in self.used:
            try:
                self._row(number, blank)
            except DataError as error:
                found[number] = str(error)
        return found

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Go on without these rows of the file."""
        out = set(numbers)
        self.used = [number for number in self.used if number not in out]

    def lengths(self) -> list[tuple[int, int]]:
        """(number of pictures, characters of text) of each row: what rows are grouped by, without decoding any."""
        chats = [chat for chat in map(self.records.__getitem__, self.used) if isinstance(chat, Chat)]
        return [(len(c.pictures), sum(len(text) for _, text in c.prompt) + len(c.answer)) for c in chats]


def check(splits: Sequence[Chats], skip: bool) -> int:
    """The number of bad rows, which are left out and logged if `skip`; else DataError tells of all of them at once."""
    told: list[str] = []
    for chats in splits:
        problems = chats.problems()
        told += [f"{chats.path}, row {number}: {problem}" for number, problem in problems.items()]
        if skip:
            chats.leave_out(list(problems))
    if told and not skip:
        more = f"; and {len(told) - NAMED} more" if len(told) > NAMED else ""
        raise DataError(
            f"{len(told)} of {sum(map(len, splits))} rows can't be trained on. {'; '.join(told[:NAMED])}{more}. "
            "Mend that, or leave them out with stage.skip_bad=true"
        )
    for line in told:
        logger.warning("%s; left out", line)
    return len(told)


def read_records(path: Path) -> list[Chat | DataError]:
    """The file's records, each distinct text and picture kept once; in place of one that is no chat, what it lacks."""
    if not path.is_file():
        raise DataError(f"no {path}: it is written by stage=preprocess; run it first, or set stage.data")
    known: dict[Any, Any] = {}
    chats: list[Chat | DataError] = []
    try:
        for record in records_in(path):
            try:
                chats.append(chat_of(record, known))
            except DataError as problem:
                chats.append(problem)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no readable Parquet file of chats ({error}): run stage=preprocess again") from error
    return chats


def records_in(path: Path) -> Iterator[dict[str, Any]]:
    columns = ["messages", "images"]
    with pyarrow.parquet.ParquetFile(path) as file:
        if absent := set(columns) - set(file.schema_arrow.names):
            raise pyarrow.ArrowInvalid(f"it has no column {' or '.join(sorted(absent))}")
        for batch in file.iter_batches(AT_ONCE, columns=columns):
            yield from batch.to_pylist()


def chat_of(record: dict[str, Any], known: dict[Any, Any]) -> Chat:
    """DataError says what is wrong with the record. `known` are texts and pictures that other records have."""
    messages, images = record["messages"], record["images"]
    if images is None:
        raise DataError("its images are null: where there are none, that is an empty list")
    if not isinstance(messages, list) or not messages:
        raise DataError("it has no messages")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"its message {place} lacks role or content")
    roles = [message["role"] for message in messages]
    check_roles(roles)
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
            raise DataError(f"its picture {place} is null, or not in the file: its bytes belong there")
    texts = [known.setdefault(message["content"], message["content"]) for message in messages]
    if (marks := sum(text.count(IMAGE_MARK) for text in texts[:-1])) != len(images):
        raise DataError(f"its prompt has {marks} {IMAGE_MARK} for {len(images)} pictures")
    pictures = tuple(known.setdefault(image["bytes"], image["bytes"]) for image in images)
    return Chat(tuple(zip(roles, texts, strict=True))[:-1], texts[-1], pictures)


def check_roles(roles: Sequence[str]) -> None:
    """DataError unless somebody asks and the assistant answers, at the end too, behind a system message or none."""
    if foreign := set(roles) - set(get_args(Role)):
        raise DataError(f"its role {min(foreign)!r} is none of {', '.join(get_args(Role))}")
    if roles[-1] != "assistant":
        raise DataError(
            f"its last message is of role {roles[-1]}: what is learned is an assistant's message at the end"
        )
    said = roles[roles[0] == "system" :]
    if said[0] != "user" or "system" in said or ("assistant", "assistant") in pairwise(said):
        raise DataError(
            f"its roles are out of order ({', '.join(roles)}): system or nothing, then user and assistant in turn"
        )
