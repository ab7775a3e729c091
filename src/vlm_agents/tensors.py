"""The nouns of a gradient: rows of tokens, what a model says of them, and the two Protocols that `learn` speaks to.

K reply tokens in all, in the order of the rows and within a row; M turns in all, in the order of their replies. A row
holds one turn, or several where each turn's tokens extend the one before. How rows become a batch (padding, pictures,
positions) is the model's own business.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlm_agents.pictures import Picture
from vlm_agents.types import Prompt, Span


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Token ids and pictures that go through a model together, on the host. `spans` are the ranges of its replies.

    `ident` says where it came from, for error messages. Two rows are equal only if they are one.
    """

    ident: str
    input_ids: np.ndarray
    images: tuple[Picture, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def reply_lengths(self) -> list[int]:
        """Tokens of each of its replies."""
        return [end - start for start, end in self.spans]


def reply_row(
    ident: str, prompt_ids: Sequence[int] | np.ndarray, reply_ids: Sequence[int], images: tuple[Picture, ...]
) -> Row:
    """The row of one prompt and its reply."""
    ids = np.concatenate([np.asarray(prompt_ids, dtype=np.int64), np.asarray(reply_ids, dtype=np.int64)])
    return Row(ident, ids, images, ((len(prompt_ids), len(ids)),))


def joined(earlier: Row, later: Row) -> Row | None:
    """One row of both, where the first prompt of the later one starts with all that the earlier holds, pictures too."""
    length = len(earlier)
    extends = (
        length <= later.spans[0][0]
        and np.array_equal(later.input_ids[:length], earlier.input_ids)
        and later.images[: len(earlier.images)] == earlier.images
    )
    return Row(earlier.ident, later.input_ids, later.images, earlier.spans + later.spans) if extends else None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model sees it, up to and including the assistant header."""

    ids: np.ndarray
    images: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of rows now, differentiable."""

    logprobs: Tensor  # [K] fp32, of the reply tokens, under the sampling temperature and the banned-token mask
    entropy: Tensor  # [K] nats
    states: Tensor  # [K H] hidden state that each reply token was predicted from; critics read them
    temperature: Tensor | None = None  # [K] where the model chooses it, one for a turn
    tempered_entropy: Tensor | None = None  # [K] `entropy` as a function of the temperature alone


class ActorCritic(Protocol):
    """A policy, and a critic's head that reads its states."""

    @property
    def exact(self) -> bool:
        """Does `score` give the log-probs that sampling gave, within 1e-4? In half precision it doesn't: there a
        row's numbers depend on what else is in its batch."""
        ...

    def score(self, rows: Sequence[Row]) -> Scores: ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `score` is the policy's that training started from, without gradient."""
        ...

    def value(self, states: Tensor) -> Tensor:
        """[M] expected return where the state is [M H]."""
        ...

    def parameters_by_role(self) -> Mapping[str, list[torch.nn.Parameter]]:
        """Trainable parameters: `policy`, `temperature` where the model chooses it, and `value`."""
        ...


class Renderer(Protocol):
    """Prompts and replies as token ids, one per model family."""

    @property
    def context(self) -> int:
        """The most tokens, prompt and reply, that the model has positions for."""
        ...

    def render(self, prompt: Prompt) -> Rendered: ...

    def fit(self, prompt: Prompt, max_tokens: int | None, reply_tokens: int = 0) -> Prompt:
        """The chat without its oldest turns, as few as make it a prompt of `max_tokens` at most and leave the reply its
        positions. TooLongError where the last turn alone is too long."""
        ...

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply that no model sampled, ended by the end-of-turn token."""
        ...

    def offsets(self, token_ids: Sequence[int]) -> np.ndarray:
        """[L 2] character range of each reply token in `Reply.text`; empty for the end-of-turn token."""
        ...
