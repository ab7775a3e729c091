"""The terms of the objective, as pure functions of tensors. They know no configuration, model or optimizer.

K reply tokens in all, M turns in all, as in `tensors`. A loss is to be minimised and comes back as one number per turn,
[M], neither summed nor averaged: whoever accumulates over ragged micro-batches sums it and divides by the number of
turns of the whole mini-batch, which is exact, and can tell which turn isn't finite. Another level of credit (ratios per
token, a group's baseline) is another function here, not a flag of one of these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """[M] each; only `loss` carries a gradient."""

    loss: Tensor
    ratio: Tensor  # new over old probability of the turn's reply, its tokens weighted
    approx_kl: Tensor  # k3 estimate of KL(old || new) over all tokens, unweighted; never negative
    clipped: Tensor  # 1 where the ratio has left [1 - clip, 1 + clip], else 0


def turn_sum(per_token: Tensor, turn_of_token: Tensor, turns: int) -> Tensor:
    """[K] -> [M]"""
    return per_token.new_zeros(turns).index_add(0, turn_of_token, per_token)


def turn_mean(per_token: Tensor, turn_of_token: Tensor, turns: int) -> Tensor:
    """[K] -> [M]: long and short replies count alike."""
    return turn_sum(per_token, turn_of_token, turns) / torch.bincount(turn_of_token, minlength=turns)


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p || q) estimated from log q - log p on samples of p: unbiased, never negative (joschu.net/blog/kl-approx)."""
    return torch.expm1(log_ratio) - log_ratio


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    token_weight: Tensor,
    turn_of_token: Tensor,
    advantages: Tensor,
    clip: float,
) -> PolicyLoss:
    """Clipped surrogate (arXiv 1707.06347) with one ratio and one advantage per turn.

    log ratio = sum over the turn's tokens of weight * (new - old log-prob), so that a turn's log-probability is
    thought_coef * thought + action (RL4VLM, arXiv 2405.10292).
    """
    log_ratio = turn_sum(token_weight * (logprobs - old_logprobs), turn_of_token, len(advantages))
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    seen = ratio.detach()
    drift = turn_sum((logprobs - old_logprobs).detach(), turn_of_token, len(advantages))
    return PolicyLoss(-surrogate, seen, k3(drift), ((seen - 1).abs() > clip).to(ratio.dtype))


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """[M] half the squared error. No clipping around the old values: it keeps a critic from tracking large returns."""
    return 0.5 * (values - returns).square()


def reference_kl(logprobs: Tensor, reference_logprobs: Tensor, turn_of_token: Tensor, turns: int) -> Tensor:
    """[M] mean over the turn's tokens of the k3 estimate of KL(policy || reference).

    Its gradient in a log-prob is 1 - reference/policy: positive, so lowered by descent, where the policy is above.
    """
    return turn_mean(k3(reference_logprobs - logprobs), turn_of_token, turns)


def turn_entropy_loss(entropy: Tensor, target: float) -> Tensor:
    """[M] half the squared distance of a turn's mean token entropy, nats, from where it should be."""
    return 0.5 * (entropy - target).square()
