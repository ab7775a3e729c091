"""Small real things for the tests of `learn`: an agent and a renderer over a few tokens, and episodes by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlm_agents.learn.credit import Gae, normalised, sampled_values
from vlm_agents.learn.samples import Sample, build, credited
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row, Scores
from vlm_agents.types import Message, Observation, Parsed, Reply, Step, Stop, Trajectory, Turn


class WordRenderer:
    """Token i reads as `words[i]`. Token 1 ends a turn, and is empty, as token 0 is."""

    context = 1000
    words = ("", "", "go", "é", "日本", '{"t":"', '","a":"', '"}', ' "', "x", "y", "z")

    def offsets(self, token_ids: Sequence[int]) -> np.ndarray:
        ends = np.cumsum([len(self.words[token]) for token in token_ids])
        return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)


class TinyAgent(nn.Module):
    """A policy and a critic over the mean embedding of all tokens so far; the reference is how it was born."""

    exact = True

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, 8)
        self.policy = nn.Linear(8, vocabulary)
        self.critic = nn.Linear(8, 1)
        self.born = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def score(self, rows: Sequence[Row]) -> Scores:
        shape = (len(rows), max(map(len, rows)))
        ids, reply = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.from_numpy(row.input_ids)
            for start, end in row.spans:
                reply[index, start:end] = True
        hidden = self.embedding(ids).cumsum(1) / torch.arange(1, shape[1] + 1)[:, None]
        states = hidden[:, :-1][reply[:, 1:]]
        logprobs = self.policy(states).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return Scores(logprobs.gather(-1, ids[reply][:, None]).squeeze(-1), entropy, states)

    def value(self, states: Tensor) -> Tensor:
        return self.critic(states.detach()).squeeze(-1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        now = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(self.born)
        with torch.no_grad():
            yield
        self.load_state_dict(now)

    def parameters_by_role(self) -> Mapping[str, list[nn.Parameter]]:
        policy = [*self.embedding.parameters(), *self.policy.parameters()]
        return {"policy": policy, "value": list(self.critic.parameters())}


@pytest.fixture
def renderer() -> Any:
    """Of tensors.Renderer what `learn` needs, but for novelty."""
    return WordRenderer()


@pytest.fixture
def tiny_agent() -> type[Any]:
    """The class, so that tests may build several, equal at birth, or change what one of them says."""
    return TinyAgent


@pytest.fixture
def make_turn() -> Callable[..., Turn]:
    def make(
        prompt: Sequence[int],
        reply: Sequence[int],
        reward: float = 0.0,
        value: float | None = 0.0,
        logprobs: Sequence[float] | None = None,
        images: tuple[Picture, ...] = (),
    ) -> Turn:
        return Turn(
            observation=Observation("now"),
            prompt=(Message("system", ("play",)), Message("user", (*images, "now"))),
            reply=Reply(
                text="".join(WordRenderer.words[token] for token in reply),
                prompt_token_ids=tuple(prompt),
                token_ids=tuple(reply),
                logprobs=tuple(logprobs or [-1.0] * len(reply)),
                value=value,
            ),
            parsed=Parsed("go"),
            step=Step(Observation("next"), reward, False, False, False, True, True),
        )

    return make


@pytest.fixture
def make_episode() -> Callable[..., Trajectory]:
    def make(*turns: Turn, seed: int = 0, stop: Stop = "success", bootstrap: float = 0.0) -> Trajectory:
        error = "worker died" if stop == "env_error" else None
        return Trajectory("words", seed, "model", turns, stop, bootstrap, error)

    return make


@pytest.fixture
def make_samples(renderer: Any, make_turn: Callable[..., Turn], make_episode: Callable[..., Trajectory]):
    """Samples of one turn each, in rows of the given lengths, with random tokens and returns, sampled by `agent`."""

    def make(agent: TinyAgent, lengths: Sequence[int]) -> list[Sample]:
        rng = np.random.default_rng(3)
        episodes = []
        for seed, length in enumerate(lengths):
            ids = rng.integers(2, 12, length).tolist()
            episodes.append(make_episode(make_turn(ids[:2], ids[2:], reward=rng.normal()), seed=seed))
        credit = normalised(Gae(gamma=0.99, lam=0.95)(episodes, sampled_values(episodes), 0.0))
        with torch.no_grad():
            return [
                replace(sample, old=logprobs, behaviour=logprobs)
                for sample in credited(build(episodes, renderer, thought_coef=0.5), episodes, credit)
                for logprobs in [agent.score([sample.row]).logprobs.numpy()]
            ]

    return make
