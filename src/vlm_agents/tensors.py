"""The nouns of a gradient: rows of tokens, what a model says of them, and the two Protocols that `learn` speaks to.

N rows, T tokens a row (right-padded), K reply tokens in all (row-major order of `reply_mask`), M turns in all
(row-major order of reply starts). A row holds one turn, or several when each turn's tokens extend the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlm_agents.pictures import Picture
from vlm_agents.types import Prompt


@dataclass(frozen=True, slots=True)
class Row:
    """One training row on the host, before padding. `spans` are the token ranges of its replies.

    Per reply token, concatenated over the spans: `token_weight`, `old_logprobs`. Per turn: `advantages`, `returns`,
    `old_values`. `ident` says where the row came from, for error messages.
    """

    ident: str
    input_ids: np.ndarray
    images: tuple[Picture, ...]
    spans: tuple[tuple[int, int], ...]
    token_weight: np.ndarray
    old_logprobs: np.ndarray
    old_values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model sees it, up to and including the assistant header."""

    ids: np.ndarray
    images: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A padded batch. `mm` is whatever the processor emits beside the ids (pixel values, grids, type ids)."""

    input_ids: Tensor  # [N T] int64
    attention_mask: Tensor  # [N T] int64
    reply_mask: Tensor  # [N T] bool
    mm: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens plus what PPO needs of them. All fp32 but `turn_of_token` (int64)."""

    tokens: Tokens
    token_weight: Tensor  # [K] 1 on action tokens, thought_coef on thought tokens
    old_logprobs: Tensor  # [K]
    turn_of_token: Tensor  # [K] index into the [M] fields
    old_values: Tensor  # [M]
    advantages: Tensor  # [M]
    returns: Tensor  # [M]
    idents: tuple[str, ...]  # [N]


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of a batch now, differentiable, fp32."""

    logprobs: Tensor  # [K] of the reply tokens, under the sampling temperature and the banned-token mask
    entropy: Tensor  # [K] nats
    values: Tensor  # [M] read at the token before each reply
    states: Tensor  # [M H] what the critic reads there, detached
    temperature: Tensor | None = None  # [M] where the model chooses it
    tempered_entropy: Tensor | None = None  # [K] `entropy` as a function of the temperature alone


class ActorCritic(Protocol):
    """A policy and a critic over the same tokens."""

    @property
    def exact(self) -> bool:
        """Does `score` give the log-probs that sampling gave, within 1e-4? In half precision it doesn't: there a
        row's numbers depend on what else is in its batch."""
        ...

    def score(self, tokens: Tokens) -> Scores: ...

    def reference_logprobs(self, tokens: Tokens) -> Tensor:
        """[K] log-probs under the policy that training started from, without gradient."""
        ...

    def value(self, states: Tensor) -> Tensor:
        """[M] what the critic makes of [M H] states."""
        ...

    def parameters_by_role(self) -> Mapping[str, list[torch.nn.Parameter]]:
        """Trainable parameters: `policy`, `temperature` where the model chooses it, and `value`."""
        ...


class Renderer(Protocol):
    """Rows to tensors, one per model family."""

    @property
    def context(self) -> int:
        """The most tokens, prompt and reply, that the model has positions for."""
        ...

    def render(self, prompt: Prompt) -> Rendered: ...

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply that no model sampled, ended by the end-of-turn token."""
        ...

    def collate(self, rows: Sequence[Row]) -> Tokens: ...

    def offsets(self, token_ids: Sequence[int]) -> np.ndarray:
        """[L 2] character range of each reply token in `Reply.text`; empty for the end-of-turn token."""
        ...
