"""Texts to token ids: what a text says is text, whatever it spells, and never a control token or a picture."""

import re
from collections.abc import Sequence
from typing import Any

from vlm_agents.errors import DataError

KEPT = 50_000  # pieces whose ids are remembered


def reserved_ids(tokenizer: Any, image_token_id: int) -> set[int]:
    """Tokens that no text may spell: the special ones, which carry the chat, and the pictures' placeholder.

    Added tokens that aren't special, such as <think>, are words like any other: a model may say them.
    """
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added | {image_token_id}


class Vocabulary:
    """Encodes for one tokenizer. Knows nothing of chats: who wrote a text, its caller knows."""

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.reserved = reserved_ids(tokenizer, image_token_id)
        spelled = [tokenizer.convert_ids_to_tokens(index) for index in sorted(self.reserved)]
        # one character alone can't be cut
        self._spelled = re.compile("|".join(re.escape(token) for token in spelled if len(token) > 1))
        # Tokenizers of sentencepiece's kind put a space before what they take for the start of a text. Where a text
        # goes on, it goes on behind this.
        self.anchor = "" if tokenizer.tokenize("a")[0] == "a" else "\n"
        self._ids: dict[str, list[int]] = {}

    def cut(self, text: str) -> list[str]:
        """The text, in parts none of which spells a reserved token; in one part as a rule."""
        parts, start = [], 0
        while match := self._spelled.search(text, start):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*parts, text[start:]]

    def encode(self, parts: Sequence[str]) -> list[int]:
        """Ids of a text that comes in parts. Reserved tokens within a part are meant: those of a chat template."""
        first, *rest = parts
        ids = list(self._encoded(first))
        for part in rest:
            ids += self._encoded(self.anchor + part)[len(self._encoded(self.anchor)) :]
        return ids

    def _encoded(self, text: str) -> list[int]:
        """Most pieces (the system message above all) come again with every turn."""
        ids = self._ids.get(text)
        if ids is None:
            if len(self._ids) > KEPT:
                self._ids.clear()
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"a text holds {text[error.start]!a}, half of a surrogate pair, which is no character"
                ) from error
            self._ids[text] = ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids
