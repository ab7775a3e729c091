"""The nouns of an episode: what an env shows, what a policy says, what came of it.

Frozen records without behaviour beyond derived values; stdlib and numpy only. Whatever can be
derived is a property, so that it can't disagree after a reload. Pictures are those of `pictures`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import numpy as np

from vlm_agents.pictures import Picture

Role = Literal["system", "user", "assistant", "tool"]
Stop = Literal["success", "failure", "time_limit", "invalid", "too_long", "env_error", "unscored"]
UNKNOWN: tuple[Stop, ...] = ("env_error", "unscored")  # nobody knows what would have come of it
Source = Literal["model", "expert", "random", "server"]
Span = tuple[int, int]
Part = str | Picture


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

    `places` say before which character of the text each of the pictures stands; without them all stand before it.
    `task` is what the episode is about, where the text doesn't say it: it is part of every prompt.
    `state_key` names the state of the world for loop counting: equal keys, equal situation. `tags` say of what kind an
    episode is (task, game file, category); those of its first observation count.
    """

    text: str
    images: tuple[Picture, ...] = ()
    legal_actions: tuple[str, ...] | None = None
    state_key: str = ""
    advice: Advice | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    task: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Texts and pictures in the order in which they are read."""
        if not self.places:
            return (*self.images, self.text)
        starts = (0, *self.places)
        texts = [self.text[start:end] for start, end in zip(starts, (*self.places, None), strict=True)]
        pairs = zip(texts, (*self.images, ""), strict=True)
        return tuple(part for pair in pairs for part in pair if part != "")


@dataclass(frozen=True, slots=True)
class Claim:
    """An answer of which a referee has to say whether it is right, in the light of the right one.

    `options` in the order of their letters, where the question had any. `source` names the data set, for the examples
    that a referee is shown. Being right earns `reward`.
    """

    question: str
    answer: str
    right: str
    options: tuple[str, ...] = ()
    source: str = ""
    reward: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """What came of an action: was it `legal`, has it `changed` what `state_key` names, is the game won?

    `reward` is what the env paid. `metrics` are the env's own figures, such as progress; those of an episode's last
    step are averaged over episodes. With a `claim` a referee says whether the game is won, and `success` and `reward`
    are without its word.
    """

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    legal: bool
    changed: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message: texts and pictures, in the order in which they are read.

    `token_ids` are set on an assistant message that a model sampled earlier in the episode: the exact ids,
    so that the reply is never tokenised anew.
    """

    role: Role
    parts: tuple[Part, ...]
    token_ids: tuple[int, ...] | None = None

    @property
    def speaker(self) -> Role:
        """The role that a chat template is told: the user's for a tool, which most templates don't know."""
        return "user" if self.role == "tool" else self.role

    @property
    def text(self) -> str:
        """All that is said in words."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a policy: the prompt, the observation it was made from, and the episode's own randomness."""

    prompt: Prompt
    observation: Observation
    rng: np.random.Generator


class Sampling(NamedTuple):
    """How a reply is sampled: at most `max_tokens` long, and ended by the first of the `stop` texts too.

    `continued`: the next prompts will begin with these and their replies, so that what was computed is worth keeping.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    greedy: bool = False
    continued: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What a policy answered. Scripted and remote policies leave the token fields empty.

    `source` is who answered: what was drawn at `random` was meant by nobody, and is never a label. `token_ids` end
    with the end-of-turn token, or with the token that ended a stop text, when `finish` is "stop"; `logprobs` are
    natural, fp32, one per token, under the sampling temperature and the banned-token mask; `entropy` is the mean over
    the reply's tokens, in nats, or that of the random draw; `value` is the critic's estimate of the return before this
    reply.
    """

    text: str
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    value: float | None = None
    entropy: float | None = None
    finish: Literal["stop", "length"] = "stop"
    source: Source = "model"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the prompt format read in a reply. Spans are character ranges of `Reply.text`.

    Either there is an `error`, or an action: `choices` are the probabilities of those that the reply leaves it to
    chance to draw from; `action` is None until one is drawn.
    """

    action: str | None
    thought_span: Span | None = None
    action_span: Span | None = None
    error: str | None = None
    choices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange: exactly what the policy saw and said, and what the world did.

    `rating` is a rater's, 0 to 10. `bonuses` are rewards beside the env's, each by its name; a penalty is below 0.
    """

    observation: Observation
    prompt: Prompt
    reply: Reply
    parsed: Parsed
    step: Step
    rating: float | None = None
    bonuses: Mapping[str, float] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        """What is trained on."""
        return reduce(add, self.bonuses.values(), self.step.reward)  # sum() would round otherwise


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One whole episode. The members of one seed began alike and were played apart.

    `bootstrap` is the value after the last turn, not zero only if the episode was cut off there: by the env, or since
    the next prompt was too long. Then, after an env's error, and where it is unscored, `error` says what was wrong.
    """

    env: str
    seed: int
    policy: str
    turns: tuple[Turn, ...]
    stop: Stop
    bootstrap: float = 0.0
    error: str | None = None
    member: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def ident(self) -> str:
        """Which play of which start, for records and errors."""
        return f"{self.env}/seed {self.seed}" + (f"/member {self.member}" if self.member else "")

    @property
    def total_reward(self) -> float:
        return float(sum(turn.reward for turn in self.turns))

    @property
    def success(self) -> bool:
        return self.stop == "success"

    @property
    def known(self) -> bool:
        """Does anybody know what came of it? If not, there is nothing to learn from and nothing to average."""
        return self.stop not in UNKNOWN
