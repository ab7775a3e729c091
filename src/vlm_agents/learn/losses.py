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
Pool = Literal["sum", "mean"]
Estimator = Callable[[Tensor], Tensor]


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


def k2(log_ratio: Tensor) -> Tensor:
    """KL(p || q) from log q - log p on samples of p: biased, never negative (joschu.net/blog/kl-approx)."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """The same: unbiased, never negative."""
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS: Mapping[str, Estimator] = {"k2": k2, "k3": k3}


def clipped(
    low: float,
    high: float,
    unit: Unit = "turn",
    pool: Pool = "sum",
    dual: float | None = None,
) -> Loss:
    """PPO's clipped surrogate (arXiv 1707.06347): ratios new over old count from 1 - low to 1 + high.

    A ratio is a turn's: its log is the sum over the turn's tokens of emphasis * (new - old log-prob), so that a turn's
    log-probability is thought_coef * thought + action (RL4VLM, arXiv 2405.10292). Or it is a token's, or a row's; the
    mean of a row is GSPO's (arXiv 2507.18071). `high` above `low` is DAPO's (arXiv 2503.14476); with `dual` a bad
    reply's ratio counts up to that at most (arXiv 1912.09729). Seen: `policy_loss`, `ratio`, `approx_kl` (k3 estimate
    of KL(old || new) over all tokens of a turn, without emphasis), `clip_fraction`.
    """

    def loss(scores: Scores, targets: Targets) -> Term:
        ratio = ratios(scores.logprobs, targets, unit, pool)
        surrogate = torch.minimum(ratio * targets.advantages, ratio.clamp(1 - low, 1 + high) * targets.advantages)
        if dual is not None:
            least = dual * targets.advantages
            surrogate = torch.where(targets.advantages < 0, torch.maximum(surrogate, least), surrogate)
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        return Term(-surrogate, _seen(-surrogate, ratio, outside, scores, targets))

    return loss


def reinforce(unit: Unit = "turn", pool: Pool = "sum") -> Loss:
    """Minus the advantage times the log-prob (Williams 1992), of a token, a turn or a row."""

    def loss(scores: Scores, targets: Targets) -> Term:
        return _weighted(targets.advantages, scores, targets, unit, pool)

    return loss


def clipped_weight(low: float, high: float, unit: Unit = "token", pool: Pool = "sum") -> Loss:
    """The log-prob weighted by the clipped ratio, through which no gradient goes, times the advantage (CISPO, arXiv
    2506.13585): a clipped token still teaches."""

    def loss(scores: Scores, targets: Targets) -> Term:
        ratio = ratios(scores.logprobs.detach(), targets, unit, pool)
        weight = ratio.clamp(1 - low, 1 + high) * targets.advantages
        return _weighted(weight, scores, targets, unit, pool, (ratio < 1 - low) | (ratio > 1 + high))

    return loss


def advantage_weighted(beta: float, cap: float, unit: Unit = "turn", pool: Pool = "sum") -> Loss:
    """The log-prob weighted by exp(advantage / beta), `cap` at most: advantage-weighted regression (arXiv 1910.00177),
    which makes good replies likelier and none unlikelier."""

    def loss(scores: Scores, targets: Targets) -> Term:
        weight = (targets.advantages / beta).exp().clamp(max=cap)
        return _weighted(weight, scores, targets, unit, pool, weight == cap)

    return loss


def corrected(inner: Loss, kind: Literal["truncate", "mask"], bound: float, unit: Unit) -> Loss:
    """`inner` times old over behaviour probability of a token, a turn or a row: for the policy that is trained isn't
    quite the one that sampled.

    Truncated at `bound` (truncated importance sampling), or 0 where it isn't within 1/bound to bound (masked). Seen
    too: `correction`, the weight.
    """

    def loss(scores: Scores, targets: Targets) -> Term:
        term = inner(scores, targets)
        drift = targets.old - targets.behaviour
        weight = _pooled(drift, targets, unit, "sum").exp()
        outside = (weight > bound) | (weight < 1 / bound)
        weight = weight.clamp(max=bound) if kind == "truncate" else weight.masked_fill(outside, 0.0)
        return Term(weight * term.loss, {**term.seen, "correction": weight})

    return loss


def ratios(logprobs: Tensor, targets: Targets, unit: Unit, pool: Pool) -> Tensor:
    """[K] probability ratio new over old of each token's unit, tokens weighted by their emphasis."""
    return _pooled(targets.emphasis * (logprobs - targets.old), targets, unit, pool).exp()


def _pooled(per_token: Tensor, targets: Targets, unit: Unit, pool: Pool) -> Tensor:
    if unit == "token":
        return per_token
    return (pooled_sum if pool == "sum" else pooled_mean)(per_token, getattr(targets, unit))


def _weighted(
    weight: Tensor, scores: Scores, targets: Targets, unit: Unit, pool: Pool, outside: Tensor | None = None
) -> Term:
    """Minus `weight` times the log-prob of each token's unit."""
    loss = -weight * _pooled(targets.emphasis * scores.logprobs, targets, unit, pool)
    ratio = ratios(scores.logprobs.detach(), targets, unit, pool)
    return Term(loss, _seen(loss, ratio, torch.zeros_like(ratio) if outside is None else outside, scores, targets))


def _seen(loss: Tensor, ratio: Tensor, outside: Tensor, scores: Scores, targets: Targets) -> dict[str, Tensor]:
    return {
        "policy_loss": loss,
        **drift(scores, targets),
        "ratio": ratio,
        "clip_fraction": outside.to(ratio.dtype),
    }


def drift(scores: Scores, targets: Targets) -> dict[str, Tensor]:
    """How far the policy is from where ratios are taken to, whatever the loss: `ratio`, of each turn, and `approx_kl`,
    the k3 estimate of KL(old || new) over all tokens of a turn."""
    log_ratio = pooled_sum(scores.logprobs.detach() - targets.old, targets.turn)
    return {"ratio": log_ratio.exp(), "approx_kl": k3(log_ratio)}


def entropy_bonus(scores: Scores, targets: Targets) -> Term:
    """Minus the entropy of what each token was drawn from, nats."""
    return Term(-scores.entropy, {"entropy": scores.entropy})


def reference_kl(estimator: Estimator) -> Loss:
    """KL(policy || reference), whose estimator's gradient is followed as it is.

    By k3 that in a log-prob is 1 - reference/policy: positive, so lowered by descent, where the policy is above. k2's
    is log(policy/reference), in the mean that of the KL itself. k1, log(policy/reference), is no loss: its gradient is
    1 whatever the policy.
    """

    def loss(scores: Scores, targets: Targets) -> Term:
        assert targets.reference is not None
        kl = estimator(targets.reference - scores.logprobs)
        return Term(kl, {"kl_reference": kl})

    return loss


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
