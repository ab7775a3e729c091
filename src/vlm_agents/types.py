"""The nouns of an episode: what an env shows, what a policy says, what came of it.

Frozen records without behaviour beyond derived values; stdlib, numpy and PIL only. Whatever can be
derived is a property, so that it can't disagree after a reload.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL.Image import Image

Role = Literal["system", "user", "assistant", "tool"]
Stop = Literal["success", "failure", "time_limit", "invalid", "env_error"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Advice:
    """What the scripted expert would say here. Never part of a prompt.

    `distance` is the number of expert steps to success from here, None where that isn't known.
    """

    thought: str
    action: str
    distance: int | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What an env shows before a turn. `legal_actions` None means free text.

    `state_key` names the state of the world for loop counting: equal keys, equal situation.
    """

    text: str
    images: tuple[Image, ...] = ()
    legal_actions: tuple[str, ...] | None = None
    state_key: str = ""
    advice: Advice | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What came of an action. `metrics` holds success, legal, changed, progress ... as floats."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its images stand before its text.

    `token_ids` are set on an assistant message that a model sampled earlier in the episode: the exact ids,
    so that the reply is never tokenised anew.
    """

    role: Role
    text: str
    images: tuple[Image, ...] = ()
    token_ids: tuple[int, ...] | None = None


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a policy: the prompt, the observation it was made from, and the episode's own randomness."""

    prompt: Prompt
    observation: Observation
    rng: np.random.Generator


@dataclass(frozen=True, slots=True)
class Reply:
    """What a policy answered. Scripted and remote policies leave the token fields empty.

    `token_ids` end with the end-of-turn token when `finish` is "stop"; `logprobs` are natural, fp32, one per token,
    under the sampling temperature and the banned-token mask; `entropy` is the mean over the reply's tokens, in nats;
    `value` is the critic's estimate of the return before this reply.
    """

    text: str
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    value: float | None = None
    entropy: float | None = None
    finish: Literal["stop", "length"] = "stop"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the prompt format read in a reply. Spans are character ranges of `Reply.text`."""

    action: str | None
    thought_span: Span | None = None
    action_span: Span | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: exactly what the policy saw and said, and what the world did."""

    observation: Observation
    prompt: Prompt
    reply: Reply
    parsed: Parsed
    step: Step


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One whole episode. `bootstrap` is the value after the last turn, not zero only if that turn was truncated.

    The members of one seed began alike and were played apart.
    """

    env: str
    seed: int
    policy: str
    turns: tuple[Turn, ...]
    stop: Stop
    bootstrap: float = 0.0
    error: str | None = None
    member: int = 0

    @property
    def total_reward(self) -> float:
        return float(sum(turn.step.reward for turn in self.turns))

    @property
    def success(self) -> bool:
        return self.stop == "success"
