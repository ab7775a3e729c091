"""Prompts to token ids: the one rendering that SFT, sampling and scoring share.

The model's own chat template is applied to marks in place of all that is said, and what comes out is tokenised piece by
piece. So replies which a model sampled earlier in the episode keep their exact ids, pictures their exact number of
placeholder tokens, and no text is taken for a control token, a picture or a mark, whatever it spells.
"""

import itertools
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from vlm_agents.errors import DataError, ModelError, TooLongError
from vlm_agents.models.families import Family
from vlm_agents.models.vocabulary import Vocabulary
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Rendered
from vlm_agents.types import Message, Part, Prompt

# Stands for the text of a message while the chat template is applied.
MARK = "\ue000{}\ue000"
MARKS = re.compile("\ue000(\\d+)\ue000")
FITTED = 256  # prompts that were rendered to be fitted, and are remembered until they are rendered
TEMPLATED = 256  # chats that the template was applied to, with marks for their texts


class HFRenderer:
    """Renders for one tokenizer and one family."""

    def __init__(self, tokenizer: Any, family: Family) -> None:
        self.tokenizer = tokenizer
        self.family = family
        self.end_of_turn: int = tokenizer.eos_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(family.image_token_id)
        if self.image_token is None:
            raise ModelError(
                f"the model's tokenizer has no token {family.image_token_id}, the picture's: add its own files"
            )
        self._pictures = re.compile(f"(?={re.escape(self.image_token)})")  # before each
        self.vocabulary = Vocabulary(tokenizer, family.image_token_id)
        self._fitted: dict[int, tuple[Prompt, Rendered]] = {}
        self._templated: dict[str, str] = {}
        self.start = [i for i in tokenizer.encode("") if i == tokenizer.bos_token_id]  # what it puts before any text
        self.takes_system = self._takes_system()
        self.lead = self._lead()
        # tokenizers of sentencepiece's kind put that space there by themselves, and drop it in decoding
        self.reply_lead = "" if tokenizer.tokenize("a")[0].startswith("\u2581") else self.lead

    @property
    def context(self) -> int:
        """The most tokens, prompt and reply, that the model has positions for."""
        return getattr(self.family.text.config, "max_position_embeddings", None) or sys.maxsize

    def _template(self, messages: list[dict[str, Any]], prompt: bool = True) -> str:
        """Kept: with marks for their texts, chats look alike."""
        key = f"{prompt} {messages}"
        made = self._templated.get(key)
        if made is None:
            if len(self._templated) >= TEMPLATED:
                self._templated.clear()
            try:
                made = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except TemplateError as error:
                raise DataError(f"the model's chat template refuses this chat ({error})") from error
            self._templated[key] = made
        return made

    def _takes_system(self) -> bool:
        """Does the chat template know system messages? Some refuse them, some leave them out."""
        mark = MARK.format(0)
        try:
            return mark in self._template([_message("system", mark), _message("user", "?")])
        except DataError:
            return False

    def _lead(self) -> str:
        """What the template writes after the prompt for a reply and before the reply: a space after [/INST]."""
        user, mark = _message("user", "?"), MARK.format(0)
        prompt = self._template([user])
        head, told, _ = self._template([user, _message("assistant", mark)], prompt=False).partition(mark)
        if told and not head.startswith(prompt):
            raise ModelError(
                f"the chat template asks for a reply after {prompt[-40:]!r} but tells one after {head[-40:]!r}: "
                "later prompts wouldn't begin with what was sampled. Use the template of a model that doesn't think"
            )
        return head.removeprefix(prompt) if told else ""

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The chat as the template sees it: with marks for what was said, but for the space around a text."""
        marks = map(MARK.format, itertools.count())
        messages = [
            _message(
                message.speaker,
                *(part if isinstance(part, Picture) else _marked(part, marks) for part in _told(message)),
            )
            for message in prompt
        ]
        if self.takes_system or messages[0]["role"] != "system":
            return messages
        system = "".join(part["text"] for part in messages[0]["content"])
        first = next(part for part in messages[1]["content"] if "text" in part)
        first["text"] = f"{system}\n\n{first['text']}"
        return messages[1:]

    def render(self, prompt: Prompt) -> Rendered:
        """DataError where the chat template or the image processor doesn't take it."""
        known = self._fitted.pop(id(prompt), None)
        return known[1] if known else self._render(prompt)

    def _render(self, prompt: Prompt) -> Rendered:
        text = self._template(self._messages(prompt))
        images = tuple(image for message in prompt for image in message.images)
        if (places := text.count(self.image_token)) != len(images):
            raise DataError(
                f"a prompt with {len(images)} pictures has {places} placeholders {self.image_token}: the model's chat "
                "template leaves pictures out"
            )
        counts = map(self._image_tokens, images)
        bos = self.tokenizer.bos_token
        ids = [] if bos and text.startswith(bos) else list(self.start)
        piece = [""]  # of text, in parts, up to a picture or a sampled reply
        # even parts are the template's, odd ones the number of what stands there: a text, or the ids of a reply
        parts = MARKS.split(text)
        told = [part for message in prompt for part in _told(message) if not isinstance(part, Picture)]
        said = [None, *(told[int(index)] for index in parts[1::2]), None]
        for before, part, after in zip(said, parts[::2], said[1:], strict=False):
            if isinstance(before, str):
                first, *rest = self.vocabulary.cut(before.strip())
                piece = [*piece[:-1], piece[-1] + first, *rest]
            elif before is not None:
                ids += [*self.vocabulary.encode(piece), *before]
                piece = [""]
                if ids[-1:] == [self.end_of_turn] and part.startswith(self.tokenizer.eos_token):
                    ids.pop()  # the sampled ids end the turn, and so does the template
            if isinstance(after, tuple):
                part = part.removesuffix(self.lead)  # the reply was sampled right after the prompt for it
            first, *rest = self._pictures.split(part)
            piece[-1] += first
            for shown in rest:
                ids += self.vocabulary.encode(piece)
                ids += [self.family.image_token_id] * (next(counts) - 1)  # the piece begins with the last of them
                piece = [shown]
        ids += self.vocabulary.encode(piece)
        return Rendered(np.array(ids, dtype=np.int64), images)

    def _image_tokens(self, image: Picture) -> int:
        try:
            return self.family.image_tokens(image.size)
        except ModelError:
            raise
        except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:  # of transformers' own code
            width, height = image.size
            raise DataError(
                f"the model's image processor takes no picture of {width}x{height} pixels ({error})"
            ) from error

    def fit(self, prompt: Prompt, max_tokens: int | None, reply_tokens: int = 0) -> Prompt:
        """The chat without its oldest turns, as few as make it a prompt of `max_tokens` at most; pictures count.

        At most as many, too, as leave the reply a position for each of `reply_tokens`. A turn goes as a whole, with its
        pictures and the reply to it; a system message stays. TooLongError where the last turn alone is too long.
        """
        limit = min(max_tokens or sys.maxsize, self.context - reply_tokens)
        first = [index for index, message in enumerate(prompt) if message.role == "user"]  # of each turn
        shorter = [prompt, *(prompt[: first[0]] + prompt[start:] for start in first[1:])]
        rendered = {0: self._render(prompt)}

        def fits(dropped: int) -> bool:
            if dropped not in rendered:
                rendered[dropped] = self._render(shorter[dropped])
            return len(rendered[dropped].ids) <= limit

        dropped = 0 if fits(0) else bisect_left(range(len(shorter)), True, lo=1, key=fits)
        if dropped == len(shorter):
            raise self._too_long(shorter[-1], len(rendered[dropped - 1].ids), max_tokens, reply_tokens)
        while len(self._fitted) >= FITTED:
            del self._fitted[next(iter(self._fitted))]
        self._fitted[id(shorter[dropped])] = shorter[dropped], rendered[dropped]
        return shorter[dropped]

    def _too_long(self, turn: Prompt, tokens: int, max_tokens: int | None, reply_tokens: int) -> TooLongError:
        pictures = sum(len(message.images) for message in turn)
        what = f"the last turn and the instructions are a prompt of {tokens} tokens with its {pictures} pictures"
        if max_tokens is not None and tokens + reply_tokens <= self.context:
            return TooLongError(f"{what}: raise prompt.max_prompt_tokens={max_tokens}, or show less")
        return TooLongError(
            f"{what}, its reply takes {reply_tokens}, and the model has positions for {self.context} in all: "
            "show fewer or smaller pictures or shorter texts, or take a model with more positions"
        )

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply that no model sampled (a demonstration), ended by the end-of-turn token."""
        first, *rest = self.vocabulary.cut(text)
        return [*self.vocabulary.encode([self.reply_lead + first, *rest]), self.end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """`Reply.text` of sampled ids: neither the end-of-turn token nor the template's space is text."""
        ids = [token for token in token_ids if token != self.end_of_turn]
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.removeprefix(self.reply_lead)

    def offsets(self, token_ids: Sequence[int]) -> np.ndarray:
        """[L 2] character range of each token, found by decoding growing prefixes: right for every tokenizer.

        Bytes of an unfinished character decode to U+FFFD, which is not counted until the character is whole.
        """
        ends = [0]
        for count in range(1, len(token_ids) + 1):
            length = len(self.decode(token_ids[:count]).rstrip("\ufffd"))
            ends.append(max(length, ends[-1]))
        ends[-1] = len(self.decode(token_ids))
        return np.array([ends[:-1], ends[1:]], dtype=np.int64).T


def _told(message: Message) -> tuple[Part | tuple[int, ...], ...]:
    """What the message says: its parts, or the exact ids of a sampled reply. At least one isn't a picture."""
    if message.token_ids is not None:
        return (*message.images, message.token_ids)
    return message.parts if any(isinstance(part, str) for part in message.parts) else (*message.parts, "")


def _marked(said: str | tuple[int, ...], marks: Iterator[str]) -> str:
    """The next mark, between the space around a text; templates trim that, or don't."""
    mark, text = next(marks), said.strip() if isinstance(said, str) else ""
    return mark if isinstance(said, tuple) else said.replace(text, mark, 1) if text else said


def _message(role: str, *parts: Part) -> dict[str, Any]:
    """One message as chat templates take it. In parts even where it is text alone: some templates know nothing else."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return {"role": role, "content": content}
