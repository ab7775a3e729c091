"""The chats of stage=preprocess as rows to train on: read from Parquet, and all checked before the first is used."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from vlm_agents.chats import flaw, read_chats
from vlm_agents.errors import DataError
from vlm_agents.marks import unmarked
from vlm_agents.models.rendering import HFRenderer
from vlm_agents.pictures import Picture, read_picture
from vlm_agents.tensors import Row, joined, reply_row
from vlm_agents.types import Message, Prompt, Role

logger = logging.getLogger(__name__)

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

    DataError where the file can't be read. What is wrong with a single row of it, `problems` says. After that, rows of
    the file that extend the one before, as later turns of a chat do, are one row here: all their answers are learned.
    """

    def __init__(
        self, path: Path, renderer: HFRenderer, max_prompt_tokens: int | None = None, whole: bool = False
    ) -> None:
        """`whole`: a chat that is too long is wrong, as without its oldest turn it would lose the question."""
        self.path, self.whole = path, whole
        self.renderer = renderer
        self.max_prompt_tokens = max_prompt_tokens
        self.records = read_records(path)
        self.used = [[number] for number in range(len(self.records))]  # rows of the file that each row here is

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> Row:
        first, *others = (self._row(number, read_picture) for number in self.used[index])
        for other in others:
            row = joined(first, other)
            assert row, f"{self.path}: its rows {self.used[index]} don't extend each other any more"
            first = row
        return first

    def question(self, index: int) -> tuple[Prompt, str, list[int]]:
        """What row `index` asks at last, as a model is asked it, and its answer, as text and as the tokens to learn."""
        return self._question(self.used[index][-1], read_picture)

    def _question(self, number: int, see: Callable[[bytes], Image.Image]) -> tuple[Prompt, str, list[int]]:
        chat = self.records[number]
        if isinstance(chat, DataError):
            raise chat
        pictures = iter([Picture(see(picture)) for picture in chat.pictures])
        prompt = tuple(Message(role, unmarked(text, pictures)) for role, text in chat.prompt)
        reply = self.renderer.encode_reply(chat.answer)
        if self.renderer.vocabulary.reserved & set(reply[:-1]):
            raise DataError("its answer has characters that the model's tokenizer has no token for")
        fitted = self.renderer.fit(prompt, self.max_prompt_tokens, len(reply))
        if self.whole and len(fitted) < len(prompt):
            raise DataError("it is too long, and would lose what was asked first: raise prompt.max_prompt_tokens")
        return fitted, chat.answer, reply

    def _row(self, number: int, see: Callable[[bytes], Image.Image]) -> Row:
        """The row in place `number` of the file, its pictures as `see` has them."""
        prompt, _, reply = self._question(number, see)
        rendered = self.renderer.render(prompt)
        return reply_row(f"{self.path}:{number}", rendered.ids, reply, rendered.images)

    def example(self) -> tuple[Message, ...]:
        """What is asked in the first row, with blanks for pictures."""
        chat = self.records[self.used[0][0]]
        assert isinstance(chat, Chat)
        blank = Picture(Image.new("RGB", (1, 1)))
        return tuple(Message(role, unmarked(text, repeat(blank))) for role, text in chat.prompt)

    def problems(self) -> dict[int, str]:
        """What is wrong with each row that can't be trained on, by its number in the file. Joins the others.

        Every distinct picture is decoded once; rows are then rendered with blank ones of its size.
        """
        sizes: dict[bytes, tuple[int, int]] = {}

        def blank(picture: bytes) -> Image.Image:
            if picture not in sizes:
                try:
                    sizes[picture] = read_picture(picture).size
                except DataError as error:
                    raise DataError(f"one of its pictures can't be read ({error})") from error
            return Image.new("RGB", sizes[picture])

        found: dict[int, str] = {}
        chains: list[list[int]] = []
        before: tuple[int, Row] | None = None
        for number in chain.from_iterable(self.used):
            try:
                row = self._row(number, blank)
            except DataError as error:
                found[number], before = str(error), None
                chains.append([number])
                continue
            if before and self._shows(before[0], number) and joined(before[1], row):
                chains[-1].append(number)
            else:
                chains.append([number])
            before = number, row
        self.used = chains
        return found

    def _shows(self, earlier: int, later: int) -> bool:
        """Does the later row of the file begin with the pictures of the earlier? Blank ones can't tell."""
        shown = [chat.pictures for chat in (self.records[earlier], self.records[later]) if isinstance(chat, Chat)]
        return shown[1][: len(shown[0])] == shown[0]

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Go on without these rows of the file."""
        out = set(numbers)
        self.used = [numbers for numbers in self.used if not out & set(numbers)]

    def lengths(self) -> list[tuple[int, int]]:
        """(number of pictures, characters of text) of each row: what rows are grouped by, without decoding any."""
        chats = [chat for chat in (self.records[numbers[-1]] for numbers in self.used) if isinstance(chat, Chat)]
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
        rows = sum(len(chats.records) for chats in splits)
        raise DataError(
            f"{len(told)} of {rows} rows can't be trained on. {'; '.join(told[:NAMED])}{more}. "
            "Mend that, or leave them out with stage.skip_bad=true"
        )
    for line in told:
        logger.warning("%s; left out", line)
    return len(told)


def read_records(path: Path) -> list[Chat | DataError]:
    """The file's records, each distinct text and picture kept once; in place of one that is no chat, what it lacks."""
    known: dict[Any, Any] = {}
    chats: list[Chat | DataError] = []
    for record in read_chats(path):
        if problem := flaw(record):
            chats.append(DataError(problem.text))
            continue
        *prompt, answer = record["messages"]
        said = tuple((message["role"], known.setdefault(message["content"], message["content"])) for message in prompt)
        pictures = tuple(known.setdefault(image["bytes"], image["bytes"]) for image in record["images"])
        chats.append(Chat(said, answer["content"], pictures))
    return chats
