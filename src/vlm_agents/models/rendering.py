"""Prompts to token ids, rows to tensors: the one rendering that SFT, sampling and scoring share.

The model's own chat template is applied to the text, and tokenised piece by piece, so that replies which a model
sampled earlier in the episode keep their exact ids and pictures keep their exact number of placeholder tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from vlm_agents.errors import DataError, ModelError
from vlm_agents.models.families import Family
from vlm_agents.models.images import ImageStore
from vlm_agents.tensors import Rendered, Row, Tokens
from vlm_agents.types import Prompt

# Stands for a sampled reply while the chat template is applied; a private-use character can't come from text of ours.
REPLY_MARK = "\ue000reply{}\ue000"
REPLY_PATTERN = re.compile("\ue000reply(\\d+)\ue000")


class HFRenderer:
    """Renders for one tokenizer and one family."""

    def __init__(self, tokenizer: Any, family: Family, images: ImageStore) -> None:
        if not tokenizer.chat_template:
            raise ModelError("the model's tokenizer has no chat template: add its chat_template.jinja to the folder")
        self.tokenizer = tokenizer
        self.family = family
        self.images = images
        self.end_of_turn: int = tokenizer.eos_token_id
        self.image_token: str = tokenizer.convert_ids_to_tokens(family.image_token_id)
        if self.image_token is None:
            raise ModelError(
                f"the model's tokenizer has no token {family.image_token_id}, the picture's: add its own files"
            )
        self._cuts = re.compile(f"(?={re.escape(self.image_token)})")  # before each picture
        self._pieces: dict[str, list[int]] = {}
        self.start = [i for i in tokenizer.encode("") if i == tokenizer.bos_token_id]  # what it puts before any text
        self.takes_system = self._takes_system()
        self.lead = self._lead()
        # tokenizers of sentencepiece's kind put that space there by themselves, and drop it in decoding
        self.reply_lead = "" if tokenizer.tokenize("a")[0].startswith("\u2581") else self.lead

    def _template(self, messages: list[dict[str, Any]], prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _takes_system(self) -> bool:
        """Does the chat template know system messages? Some refuse them, some leave them out."""
        mark = REPLY_MARK.format(0)
        try:
            return mark in self._template([_message("system", mark), _message("user", "?")])
        except TemplateError:
            return False

    def _lead(self) -> str:
        """What the template writes after the prompt for a reply and before the reply: a space after [/INST]."""
        user, mark = _message("user", "?"), REPLY_MARK.format(0)
        prompt = self._template([user])
        head, told, _ = self._template([user, _message("assistant", mark)], prompt=False).partition(mark)
        if told and not head.startswith(prompt):
            raise ModelError(
                f"the chat template asks for a reply after {prompt[-40:]!r} but tells one after {head[-40:]!r}: "
                "later prompts wouldn't begin with what was sampled. Use the template of a model that doesn't think"
            )
        return head.removeprefix(prompt) if told else ""

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        messages = [
            _message(m.role, m.text if m.token_ids is None else REPLY_MARK.format(index), len(m.images))
            for index, m in enumerate(prompt)
        ]
        if self.takes_system or messages[0]["role"] != "system":
            return messages
        (system,), first = messages[0]["content"], messages[1]["content"]
        first[-1]["text"] = f"{system['text']}\n\n{first[-1]['text']}"
        return messages[1:]

    def render(self, prompt: Prompt) -> Rendered:
        text = self._template(self._messages(prompt))
        images = tuple(image for message in prompt for image in message.images)
        if (places := text.count(self.image_token)) != len(images):
            raise DataError(
                f"a prompt with {len(images)} pictures has {places} placeholders {self.image_token}: its chat template "
                "leaves pictures out, or one of its texts spells the placeholder"
            )
        remaining = iter(images)
        bos = self.tokenizer.bos_token
        ids = [] if bos and text.startswith(bos) else list(self.start)
        # even parts are text, odd parts the index of the message whose sampled ids stand there
        parts = REPLY_PATTERN.split(text)
        for position, part in enumerate(parts):
            if position % 2:
                ids.extend(prompt[int(part)].token_ids or ())
                continue
            if position and ids[-1:] == [self.end_of_turn] and part.startswith(self.tokenizer.eos_token):
                ids.pop()  # the sampled ids end the turn, and so does the template
            if position + 1 < len(parts):
                part = part.removesuffix(self.lead)  # the reply was sampled right after the prompt for it
            for piece in self._cuts.split(part):
                if piece.startswith(self.image_token):
                    count = self.family.image_tokens(next(remaining).size)
                    ids.extend([self.family.image_token_id] * (count - 1))  # the piece begins with the last of them
                ids.extend(self._tokenise(piece))
        return Rendered(np.array(ids, dtype=np.int64), images)

    def fit(self, prompt: Prompt, max_tokens: int) -> Prompt:
        """The chat without its oldest turns, as few as make it a prompt of `max_tokens` at most; pictures count.

        A turn goes as a whole, with its pictures and the reply to it; a system message stays. DataError where the
        last turn alone is too long.
        """
        first = [index for index, message in enumerate(prompt) if message.role == "user"]  # of each turn
        shorter = [prompt[: first[0]] + prompt[start:] for start in first]
        dropped = bisect_left(shorter, True, key=lambda chat: len(self.render(chat).ids) <= max_tokens)
        if dropped == len(shorter):
            raise DataError(
                f"the last turn and the instructions are a prompt of {len(self.render(shorter[-1]).ids)} tokens with "
                f"its {len(shorter[-1][-1].images)} pictures: raise prompt.max_prompt_tokens={max_tokens}, or show less"
            )
        return shorter[dropped]

    def _tokenise(self, text: str) -> list[int]:
        """Most pieces (the system message above all) come again with every turn."""
        if text not in self._pieces:
            if len(self._pieces) > 50_000:
                self._pieces.clear()
            self._pieces[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._pieces[text]

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply that no model sampled (a demonstration), ended by the end-of-turn token."""
        return [*self.tokenizer.encode(self.reply_lead + text, add_special_tokens=False), self.end_of_turn]

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


def _message(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
    """One message as chat templates take it. In parts even where it is text alone: some templates know nothing else."""
    return {"role": role, "content": [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]}
