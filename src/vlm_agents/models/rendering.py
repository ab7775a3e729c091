"""Prompts to token ids, rows to tensors: the one rendering that SFT, sampling and scoring share.

The model's own chat template is applied to the text, and tokenised piece by piece, so that replies which a model
sampled earlier in the episode keep their exact ids and pictures keep their exact number of placeholder tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from vlm_agents.errors import DataError
from vlm_agents.models.families import Family
from vlm_agents.models.images import ImageStore
from vlm_agents.tensors import Row, Tokens
from vlm_agents.types import Message, Prompt

# Stands for a sampled reply while the chat template is applied; a private-use character can't come from text of ours.
REPLY_MARK = "\ue000reply{}\ue000"
REPLY_PATTERN = re.compile("\ue000reply(\\d+)\ue000")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model sees it, up to and including the assistant header."""

    ids: np.ndarray
    images: tuple[Image, ...]


class HFRenderer:
    """Renders for one tokenizer and one family."""

    def __init__(self, tokenizer: Any, family: Family, images: ImageStore) -> None:
        self.tokenizer = tokenizer
        self.family = family
        self.images = images
        self.end_of_turn: int = tokenizer.eos_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(family.image_token_id)
        self._pieces: dict[str, list[int]] = {}

    def render(self, prompt: Prompt) -> Rendered:
        messages = [_message(index, message) for index, message in enumerate(prompt)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = tuple(image for message in prompt for image in message.images)
        if (places := text.count(self.image_token)) != len(images):
            raise DataError(
                f"a prompt with {len(images)} pictures has {places} placeholders {self.image_token}: its chat template "
                "leaves pictures out, or one of its texts spells the placeholder"
            )
        remaining = iter(images)
        ids: list[int] = []
        # even parts are text, odd parts the index of the message whose sampled ids stand there
        parts = REPLY_PATTERN.split(text)
        for position, part in enumerate(parts):
            if position % 2:
                ids.extend(prompt[int(part)].token_ids or ())
                continue
            if position and ids and ids[-1] == self.end_of_turn:
                part = part.removeprefix(self.tokenizer.eos_token)  # the sampled ids already end the turn
            for place, piece in enumerate(part.split(self.image_token)):
                if place:
                    ids.extend([self.family.image_token_id] * self.family.image_tokens(next(remaining).size))
                ids.extend(self._tokenise(piece))
        return Rendered(np.array(ids, dtype=np.int64), images)

    def _tokenise(self, text: str) -> list[int]:
        """Most pieces (the system message above all) come again with every turn."""
        if text not in self._pieces:
            if len(self._pieces) > 50_000:
                self._pieces.clear()
            self._pieces[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._pieces[text]

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply that no model sampled (a demonstration), ended by the end-of-turn token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """`Reply.text` of sampled ids: the end-of-turn token is no text."""
        ids = [token for token in token_ids if token != self.end_of_turn]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

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

    def collate(self, rows: Sequence[Row]) -> Tokens:
        """Right-padded rows. Raises DataError where a row's placeholder tokens don't match its pictures."""
        width = max(len(row.input_ids) for row in rows)
        shape = (len(rows), width)
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        reply_mask = np.zeros(shape, dtype=bool)
        positions = np.zeros((self.position_axes, *shape), dtype=np.int64)
        for index, row in enumerate(rows):
            self.check(row)
            length = len(row.input_ids)
            input_ids[index, :length] = row.input_ids
            attention_mask[index, :length] = 1
            positions[:, index, :length] = self.family.positions(row.input_ids, [image.size for image in row.images])
            for start, end in row.spans:
                reply_mask[index, start:end] = True
        mm = {"position_ids": torch.from_numpy(positions)}
        mm |= self.images.batch([image for row in rows for image in row.images])
        return Tokens(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), torch.from_numpy(reply_mask), mm)

    @property
    def position_axes(self) -> int:
        return self.family.positions(np.zeros(1, dtype=np.int64), []).shape[0]

    def check(self, row: Row) -> None:
        tokens = int((row.input_ids == self.family.image_token_id).sum())
        features = sum(self.family.image_tokens(image.size) for image in row.images)
        if tokens != features:
            raise DataError(
                f"{row.ident}: {tokens} image placeholder tokens for {len(row.images)} pictures that make {features}: "
                "the row was cut or a picture is missing; collect or preprocess it again"
            )


def _message(index: int, message: Message) -> dict[str, Any]:
    text = message.text if message.token_ids is None else REPLY_MARK.format(index)
    if not message.images:
        return {"role": message.role, "content": text}
    content: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
    return {"role": message.role, "content": [*content, {"type": "text", "text": text}]}
