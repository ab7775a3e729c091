"""Parts of somebody's own: what is refused, with what words, and that they come along in a checkpoint."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import ConfigError, TrainingError
from vlm_agents.learn.algorithm import Algorithm, make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.credit import Credit, Returns
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.losses import Term
from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Renderer, Scores
from vlm_agents.types import Trajectory

HERE = "tests.learn.test_own_algorithm"


class RunningMean:
    """Return less the mean of all returns so far."""

    reads = "nothing"

    def __init__(self) -> None:
        self.total = self.count = 0.0

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        mean = self.total / self.count if self.count else 0.0
        self.total += sum(one.total_reward for one in episodes)
        self.count += len(episodes)
        return [Credit(np.full(len(one.turns), one.total_reward - mean, np.float32)) for one in episodes]

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


@dataclass(frozen=True)
class Reads:
    reads: Any

    def __call__(self, *_: Any) -> list[Credit]:
        return []


FAULTS: dict[str, tuple[Callable[[Algorithm], Any], str]] = {
    "nothing": (lambda _: None, "a NoneType and no Algorithm: change the one it is called with"),
    "bare loss": (lambda made: replace(made, terms=(lambda *_: None,)), "`terms` that aren't pairs of a coefficient"),
    "no terms": (lambda made: replace(made, terms=()), "`terms` that aren't pairs of a coefficient and a loss"),
    "no reads": (lambda made: replace(made, credit=lambda *_: []), "whose `reads` is None and none of nothing, turns"),
    "other reads": (lambda made: replace(made, credit=Reads("value")), "whose `reads` is 'value' and none of nothing,"),
}


def make(algorithm: Algorithm, algo: AlgoConfig, fault: str) -> Any:
    return FAULTS[fault][0](algorithm)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_factory_gives_is_looked_into(fault: str):
    algo = AlgoConfig("ppo", factory=f"{HERE}:make", kwargs={"fault": fault})
    with pytest.raises(ConfigError, match=rf"algo\.factory={HERE}:make gives .*{re.escape(FAULTS[fault][1])}"):
        make_algorithm(algo, 8, tempered=False)


def test_kwargs_are_settings_of_a_factory():
    with pytest.raises(ConfigError, match=r"algo\.kwargs are what algo\.factory is given, and there is none"):
        AlgoConfig("ppo", kwargs={"width": 1})
    with pytest.raises(ConfigError, match=r"algo\.kwargs must be settings: 'algo\.kwargs=\{size: 8\}'"):
        AlgoConfig("ppo", factory="a:b", kwargs="width")


def learner_of(agent: Any, renderer: Renderer, **parts: Any) -> Learner:
    algo = AlgoConfig("ppo", normalise=False, value_warmup=0, max_mismatch_kl=None)
    algorithm = replace(make_algorithm(algo, 8, tempered=False), **parts)
    return Learner(agent, renderer, algorithm, algo, 10, Shares(1000))


@pytest.fixture
def episodes(make_turn: Callable[..., Any], make_episode: Callable[..., Trajectory]) -> list[Trajectory]:
    return [make_episode(make_turn([2, 3], [9, 1], float(seed)), seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            lambda scores, _: Term(scores.logprobs.mean(), {}),
            r"a loss gives shapes \[\(\)\] for 6 reply tokens: it must",
        ),
        (
            lambda scores, _: Term(scores.logprobs, {"a": scores.states}),
            r"shapes \[\(6,\), \(6, 8\)\] for 6 reply tokens",
        ),
        (lambda scores, _: scores.logprobs, r"a loss gives Tensor for 6 reply tokens: it must give Term\(loss, seen\)"),
    ],
)
def test_a_loss_that_is_no_number_for_each_reply_token_is_refused(
    tiny_agent: Any, renderer: Renderer, episodes: list[Trajectory], given: Any, words: str
):
    learner = learner_of(tiny_agent(), renderer, terms=((1.0, given),))
    with pytest.raises(TrainingError, match=words):
        learner.learn(episodes, 3, np.random.default_rng(0))


def test_a_loss_need_not_see_anything(tiny_agent: Any, renderer: Renderer, episodes: list[Trajectory]):
    learner = learner_of(tiny_agent(), renderer, terms=((1.0, lambda scores, _: Term(-scores.logprobs, {})),))
    metrics = learner.learn(episodes, 3, np.random.default_rng(0))
    assert {"ppo/ratio_at_start", "ppo/approx_kl", "ppo/mismatch_kl"} <= metrics.keys()


@pytest.mark.parametrize(("normalise", "spread"), [(False, np.sqrt(2 / 3)), (True, 1.0)])
def test_whether_advantages_are_normalised_is_the_algorithms_say(
    tiny_agent: Any, renderer: Renderer, episodes: list[Trajectory], normalise: bool, spread: float
):
    """Returns of 0, 1 and 2: whatever algo.normalise says."""
    seen: list[np.ndarray] = []

    def term(scores: Scores, targets: Targets) -> Term:
        seen.append(targets.advantages.numpy())
        return Term(-scores.logprobs, {})

    parts = {"credit": Returns(gamma=1.0), "warming": None, "terms": ((1.0, term),), "normalise": normalise}
    learner_of(tiny_agent(), renderer, **parts).learn(episodes, 3, np.random.default_rng(0))
    assert np.concatenate(seen).std() == pytest.approx(spread, rel=1e-5)


def test_a_rule_that_keeps_something_goes_on_with_the_run(
    tiny_agent: Any, renderer: Renderer, episodes: list[Trajectory]
):
    whole, stopped = (learner_of(tiny_agent(), renderer, credit=RunningMean()) for _ in range(2))
    rng = np.random.default_rng
    found = [whole.learn(episodes, 3, rng(seed)) for seed in range(2)]
    stopped.learn(episodes, 3, rng(0))
    resumed = learner_of(stopped.model, renderer, credit=RunningMean())
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.learn(episodes, 3, rng(1)) == found[1]
    assert found[0]["ppo/zero_advantage"] == found[1]["ppo/zero_advantage"] == 1 / 3  # return 0 of 0, then 1 of mean 1
