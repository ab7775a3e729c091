"""A surrogate of one's own: `python -m vlm_agents stage=ppo algo.factory=examples.own_loss:make ...`."""

from dataclasses import replace

import torch

from vlm_agents.config import AlgoConfig
from vlm_agents.learn.algorithm import Algorithm
from vlm_agents.learn.losses import Loss, Term, ratios
from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Scores


def soft_clipped(width: float) -> Loss:
    """PPO's surrogate with a ratio that is bent to 1 +- width instead of being cut off there."""

    def loss(scores: Scores, targets: Targets) -> Term:
        ratio = ratios(scores.logprobs, targets, unit="turn", pool="sum")  # [K], new over old of each token's turn
        bent = 1 + width * torch.tanh((ratio - 1) / width)
        surrogate = torch.minimum(ratio * targets.advantages, bent * targets.advantages)
        return Term(-surrogate, {"policy_loss": -surrogate, "bend": ratio - bent})  # what is seen becomes ppo/<name>

    return loss


def make(algorithm: Algorithm, algo: AlgoConfig, width: float = 0.2) -> Algorithm:
    """The first term is the surrogate; `width` comes from algo.kwargs."""
    (coef, _), *others = algorithm.terms
    return replace(algorithm, terms=((coef, soft_clipped(width)), *others))
