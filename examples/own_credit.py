"""Credit of one's own: `python -m vlm_agents stage=ppo algo=grpo algo.factory=examples.own_credit:make ...`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_agents.config import AlgoConfig
from vlm_agents.learn.algorithm import Algorithm
from vlm_agents.learn.credit import Credit
from vlm_agents.types import Trajectory


@dataclass(frozen=True)
class BestOfGroup:
    """1 for every turn of the best plays of a start that differ at all, 0 for the others."""

    reads = "nothing"  # or "turns", "tokens": before what it wants a critic's values

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        scores: dict[int, list[float]] = {}
        for episode in episodes:
            scores.setdefault(episode.seed, []).append(episode.total_reward)
        return [
            Credit(np.full(len(one.turns), self.best(one.total_reward, scores[one.seed]), dtype=np.float32))
            for one in episodes
        ]

    def best(self, score: float, others: list[float]) -> float:
        return float(score == max(others) > min(others))


def make(algorithm: Algorithm, algo: AlgoConfig) -> Algorithm:
    """The algorithm that the settings give, with another rule in it."""
    return replace(algorithm, credit=BestOfGroup())
