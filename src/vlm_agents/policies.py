"""Who answers: the scripted expert, chance, a model, a server, or one of them with random moves mixed in.

A policy sees queries and gives replies in the prompt format's own words; it never touches an env. A reply drawn by
chance says so (`source`): the text to learn from in a recorded turn is `reply.text` where that was meant, else what
`observation.advice` says, else nothing.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlm_agents.errors import ConfigError
from vlm_agents.prompting import PromptFormat
from vlm_agents.stopwatch import Stopwatch
from vlm_agents.types import Prompt, Query, Reply, Sampling

if TYPE_CHECKING:  # env workers import this module and need no torch
    from vlm_agents.remote import ChatClient
    from vlm_agents.tensors import Renderer

NO_PLAN = "no plan"
NOISE = "+noise"  # between a policy's name and the share of its turns that are drawn at random


class Policy(Protocol):
    """Answers queries in batches. All its randomness comes from `Query.rng`."""

    name: str
    format: PromptFormat  # how it is asked, and its replies are read

    def reply(self, queries: Sequence[Query]) -> list[Reply]: ...

    def value(self, queries: Sequence[Query]) -> list[float]:
        """The expected return from each query on; 0 from a policy without a critic."""
        ...


class Sampler(Protocol):
    """Where a model's replies come from: the model itself, or an engine that holds a copy of its weights."""

    @property
    def renderer(self) -> "Renderer":
        """Its prompts as ids, and how many of them it takes."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], rngs: Sequence[np.random.Generator], sampling: Sampling
    ) -> list[Reply]:
        """One reply a prompt, with its ids, their log-probs and the critic's value."""
        ...

    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        """The critic's estimate for each prompt."""
        ...

    def sync(self) -> None:
        """Take the weights as they are now, and forget what was computed before: it must not matter."""
        ...


class TrainingSampler(Sampler, Protocol):
    """One that plays while the weights are trained."""

    @property
    def stopwatch(self) -> Stopwatch:
        """Where the seconds of its replies go."""
        ...

    def synced(self) -> AbstractContextManager[None]:
        """`sync`, for as long as these weights play."""
        ...


def random_reply(query: Query, prompt_format: PromptFormat) -> Reply:
    """A legal action drawn uniformly, written with the thought "no plan"."""
    legal = query.observation.legal_actions
    if legal is None:
        raise ConfigError(
            "random moves need an env that lists its legal actions, and this one takes free text: "
            "set stage.noise=0 and choose another stage.policy than random"
        )
    action = legal[int(query.rng.integers(len(legal)))]
    return Reply(prompt_format.write(NO_PLAN, action, legal), entropy=math.log(len(legal)), source="random")


class ExpertPolicy:
    """Says what the observation's advice says; where there is none (the expert is lost), moves at random."""

    name = "expert"

    def __init__(self, prompt_format: PromptFormat) -> None:
        self.format = prompt_format

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        return [self._say(query) for query in queries]

    def value(self, queries: Sequence[Query]) -> list[float]:
        return [0.0] * len(queries)

    def _say(self, query: Query) -> Reply:
        advice = query.observation.advice
        if advice is None:
            return random_reply(query, self.format)
        text = self.format.write(advice.thought, advice.action, query.observation.legal_actions)
        return Reply(text, source="expert")


class RandomPolicy:
    """Plays uniformly random legal actions: the floor that eval compares with."""

    name = "random"

    def __init__(self, prompt_format: PromptFormat) -> None:
        self.format = prompt_format

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        return [random_reply(query, self.format) for query in queries]

    def value(self, queries: Sequence[Query]) -> list[float]:
        return [0.0] * len(queries)


class NoisyPolicy:
    """Another policy, but a share `noise` of the turns is played at random, so that its data shows how to recover.

    The random move is the reply, in the record as in later prompts, for that is what the world saw. What the expert
    would have said there stays in `observation.advice`. The inner policy isn't asked on such turns.
    """

    def __init__(self, policy: Policy, noise: float) -> None:
        self.name = f"{policy.name}{NOISE}{noise:g}"
        self.format = policy.format
        self._policy = policy
        self._noise = noise

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        strays = [query.rng.random() < self._noise for query in queries]
        asked = [query for query, stray in zip(queries, strays, strict=True) if not stray]
        said = iter(self._policy.reply(asked) if asked else [])
        return [
            random_reply(query, self.format) if stray else next(said)
            for query, stray in zip(queries, strays, strict=True)
        ]

    def value(self, queries: Sequence[Query]) -> list[float]:
        return self._policy.value(queries)


class ModelPolicy:
    """Samples from a model, or decodes greedily."""

    def __init__(self, sampler: Sampler, prompt_format: PromptFormat, sampling: Sampling) -> None:
        self.name = "model_greedy" if sampling.greedy else "model"
        self.format = prompt_format
        self._sampler = sampler
        self._sampling = sampling

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        prompts, rngs = [query.prompt for query in queries], [query.rng for query in queries]
        return self._sampler.generate(prompts, rngs, self._sampling)

    def value(self, queries: Sequence[Query]) -> list[float]:
        return self._sampler.values([query.prompt for query in queries])


class RemotePolicy:
    """Samples from a chat model on a server, and has no critic.

    A reply without a legal action is asked for again, `samples` in all; the last one stands, whatever it holds.
    Each query's randomness seeds its samples: a continued run asks what it asked before.
    """

    name = "remote"

    def __init__(
        self,
        client: "ChatClient",
        prompt_format: PromptFormat,
        sampling: Sampling,
        temperature: float,
        samples: int,
    ) -> None:
        self.format = prompt_format
        self._client = client
        self._sampling = sampling
        self._temperature = temperature
        self._samples = samples

    def reply(self, queries: Sequence[Query]) -> list[Reply]:
        def readable(index: int, text: str) -> bool:
            return self.format.parse(self._cut(text), queries[index].observation.legal_actions).error is None

        answers = self._client.complete(
            [query.prompt for query in queries],
            self._sampling._replace(stop=()),  # servers leave such a text out of the reply
            self._temperature,
            seeds=[int(query.rng.integers(2**31)) for query in queries],
            readable=readable,
            samples=self._samples,
        )
        return [Reply(self._cut(answer.text), finish=answer.finish, source="server") for answer in answers]

    def _cut(self, text: str) -> str:
        """Up to and with the first text that ends a reply."""
        ends = [text.index(stop) + len(stop) for stop in self._sampling.stop if stop in text]
        return text[: min(ends, default=len(text))]

    def value(self, queries: Sequence[Query]) -> list[float]:
        return [0.0] * len(queries)
