"""The terms of the objective. They know no configuration, model or optimizer.

K reply tokens in all, as in `tensors`. A term is to be minimised and is one number per reply token, [K], neither summed
nor averaged: what belongs to a turn, as a ratio of its whole reply does, is repeated for each of the turn's tokens. The
loss is the sum of each token's number times its weight (`averages`), so how a mini-batch was cut changes nothing.
Another kind of ratio or penalty is another function here, not a flag of one of these.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Scores

Unit = Literal["token", "turn", "row"]


class Term(NamedTuple):
    """`loss` carries the gradient; `seen` is what is worth a curve, by name. [K] each."""

    loss: Tensor
    seen: Mapping[str, Tensor]


Loss = Callable[[Scores, Targets], Term]


def pooled_sum(per_token: Tensor, unit: Tensor) -> Tensor:
    """[K] the sum over all tokens of the same unit, for each of them; `unit` [K] says which that is, from 0 on."""
    units = int(unit[-1]) + 1
    return per_token.new_zeros(units).index_add(0, unit, per_token)[unit]


def pooled_mean(per_token: Tensor, unit: Tensor) -> Tensor:
    """[K] the mean instead: long and short units are alike."""
    return pooled_sum(per_token, unit) / torch.bincount(unit)[unit]


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p || q) estimated from log q - log p on samples of p: unbiased, never negative (joschu.net/blog/kl-approx)."""
    return torch.expm1(log_ratio) - log_ratio


def clipped(low: float, high: float, unit: Unit = "turn", pool: Literal["sum", "mean"] = "sum") -> Loss:
    """PPO's clipped surrogate (arXiv 1707.06347): ratios new over old count from 1 - low to 1 + high.

    A ratio is a turn's: its log is the sum over the turn's tokens of emphasis * (new - old log-prob), so that a turn's
    log-probability is thought_coef * thought + action (RL4VLM, arXiv 2405.10292). Or it is a token's, or a row's; the
    mean of a row is GSPO's (arXiv 2507.18071). Seen: `policy_loss`, `ratio`, `approx_kl` (k3 estimate of
    KL(old || new) over all tokens of a turn, without emphasis), `clip_fraction`.
    """

    def loss(scores: Scores, targets: Targets) -> Term:
        drift = scores.logprobs - targets.old
        log_ratio = targets.emphasis * drift
        if unit != "token":
            log_ratio = (pooled_sum if pool == "sum" else pooled_mean)(log_ratio, getattr(targets, unit))
        ratio = log_ratio.exp()
        surrogate = torch.minimum(ratio * targets.advantages, ratio.clamp(1 - low, 1 + high) * targets.advantages)
        seen = {
            "policy_loss": -surrogate,
            "ratio": ratio,
            "approx_kl": k3(pooled_sum(drift.detach(), targets.turn)),
            "clip_fraction": ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype),
        }
        return Term(-surrogate, seen)

    return loss


def entropy_bonus(scores: Scores, targets: Targets) -> Term:
    """Minus the entropy of what each token was drawn from, nats."""
    return Term(-scores.entropy, {"entropy": scores.entropy})


def reference_kl(scores: Scores, targets: Targets) -> Term:
    """The k3 estimate of KL(policy || reference).

    Its gradient in a log-prob is 1 - reference/policy: positive, so lowered by descent, where the policy is above.
    """
    assert targets.reference is not None
    kl = k3(targets.reference - scores.logprobs)
    return Term(kl, {"kl_reference": kl})


def turn_entropy(target: float) -> Loss:
    """Half the squared distance of a turn's mean token entropy from `target`, nats: for a learned temperature."""

    def loss(scores: Scores, targets: Targets) -> Term:
        assert scores.tempered_entropy is not None
        assert scores.temperature is not None
        distance = 0.5 * (pooled_mean(scores.tempered_entropy, targets.turn) - target).square()
        return Term(distance, {"temperature": scores.temperature, "turn_entropy_loss": distance})

    return loss


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """[M] half the squared error. No clipping around the old values: it keeps a critic from tracking large returns."""
    return 0.5 * (values - returns).square()
