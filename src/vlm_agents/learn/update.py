"""Mini-batches of samples through the model, each a sum of micro-batches and one optimizer step.

Blind to the algorithm: that is the `Objective`. It collects nothing, logs nothing and saves nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm_agents.errors import TrainingError
from vlm_agents.learn.averages import Average, over_turns
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.critic import Critic, Read
from vlm_agents.learn.losses import Loss, Term, drift, k3
from vlm_agents.learn.samples import Sample, to_targets
from vlm_agents.tensors import ActorCritic, Scores

Backward = Callable[[Tensor], None]
PREFIX = "ppo/"  # of the metrics of an update, whatever the algorithm


class Objective(NamedTuple):
    """What is minimised: the average over reply tokens of the sum of each coefficient times its term."""

    terms: Sequence[tuple[float, Loss]]
    average: Average


@dataclass(frozen=True, slots=True)
class Pass:
    """What is left of a mini-batch that went through the model, on all ranks, longest sample first."""

    seen: dict[str, Tensor]  # [K] each, on the host
    weight: Tensor  # [K] of each token in a mean over turns, whatever the loss is the mean of
    turns: int
    read: list[Read]  # by the critic, one a sample; empty without one

    def mean(self, name: str) -> float:
        return float((self.weight * self.seen[name]).sum())


def go_through(
    model: ActorCritic,
    minibatch: Sequence[Sample],
    objective: Objective,
    critic: Critic | None,
    shares: Shares,
    backward: Backward | None,
    even: bool = False,
) -> Pass:
    """Forward and, where `backward` is given, backward through this rank's share of one mini-batch.

    `even`: no rank may make fewer passes than another; it then makes some more, of no weight. TrainingError where a
    number of a term isn't finite.
    """
    minibatch = sorted(minibatch, key=len, reverse=True)
    rows = [sample.row for sample in minibatch]
    weights = dict(zip(minibatch, objective.average(rows), strict=True))
    by_turn = weights if objective.average is over_turns else dict(zip(minibatch, over_turns(rows), strict=True))
    deal = shares.deal(minibatch)
    found: list[tuple[dict[str, Tensor], Read | None]] = []
    for part in deal.own:
        with torch.set_grad_enabled(backward is not None):
            scores = model.score([sample.row for sample in part])
            targets = to_targets(part, [weights[sample] for sample in part], scores.logprobs.device)
            terms = [(coef, loss(scores, targets)) for coef, loss in objective.terms]
        _refuse_misshapen(terms, scores)
        seen = {name: values for _, term in terms for name, values in term.seen.items()}
        seen = seen if "ratio" in seen and "approx_kl" in seen else drift(scores, targets) | seen
        seen = dict(zip(seen, torch.stack(list(seen.values())).detach().cpu(), strict=True))
        _refuse_not_finite(seen, part)
        read = [None] * len(part) if critic is None else critic.read(scores, targets)
        found += zip(by_sample(seen, part), read, strict=True)
        if backward is not None:
            backward(torch.stack([coef * (targets.weight * term.loss).sum() for coef, term in terms if coef]).sum())
    if even and backward is not None:
        for _ in range(deal.missing):
            backward(0.0 * model.score(rows[-1:]).logprobs.sum())
    everywhere = deal.gathered(found)
    return Pass(
        seen={name: torch.cat([seen[name] for seen, _ in everywhere]) for name in everywhere[0][0]},
        weight=torch.cat([torch.from_numpy(by_turn[sample]) for sample in minibatch]),
        turns=sum(len(sample.row.spans) for sample in minibatch),
        read=[read for _, read in everywhere if read is not None],
    )


def by_sample(seen: dict[str, Tensor], part: Sequence[Sample]) -> list[dict[str, Tensor]]:
    """The [K] numbers of a micro-batch, cut into those of each sample."""
    pieces = [values.split([len(sample.old) for sample in part]) for values in seen.values()]
    return [dict(zip(seen, its, strict=True)) for its in zip(*pieces, strict=True)]


@torch.no_grad()
def read_once(
    model: ActorCritic,
    samples: Sequence[Sample],
    plan: Iterable[Sequence[int]],
    shares: Shares,
    of: Callable[[Scores], Tensor] = lambda scores: scores.logprobs,
) -> list[np.ndarray]:
    """[k ...] what a pass of the update says now `of` each sample's reply tokens.

    In the micro-batches of the planned mini-batches of samples: a row's numbers depend on those that it is padded and
    summed with.
    """
    found: dict[Sample, np.ndarray] = {}
    for indices in plan:
        deal, own = shares.deal([samples[index] for index in indices]), list[np.ndarray]()
        for part in deal.own:
            pieces = of(model.score([sample.row for sample in part])).split([len(sample.old) for sample in part])
            own += [piece.cpu().numpy() for piece in pieces]
        found.update(zip(deal.parts, deal.gathered(own), strict=True))
    return [found[sample] for sample in samples]


def mismatch_kl(samples: Sequence[Sample]) -> float:
    """Mean over all turns of the k3 estimate of KL(behaviour || old)."""
    drifts = []
    for sample in samples:
        starts = np.cumsum([0, *sample.row.reply_lengths[:-1]])
        drifts.append(np.add.reduceat(sample.old.astype(np.float64) - sample.behaviour, starts))
    return float(k3(torch.from_numpy(np.concatenate(drifts))).mean())


def _refuse_misshapen(terms: Sequence[tuple[float, Term]], scores: Scores) -> None:
    """TrainingError where a term of somebody's own isn't one number per reply token."""
    for _, term in terms:
        given = [term.loss, *term.seen.values()] if isinstance(term, Term) else []
        if not given or any(one.shape != scores.logprobs.shape for one in given):
            shapes = [tuple(one.shape) for one in given]
            raise TrainingError(
                f"a loss gives {f'shapes {shapes}' if given else type(term).__name__} for {len(scores.logprobs)} reply "
                "tokens: it must give Term(loss, seen) with one number for each of them, neither summed nor averaged"
            )


def _refuse_not_finite(seen: dict[str, Tensor], part: Sequence[Sample]) -> None:
    for name, values in seen.items():
        if not values.isfinite().all():
            pieces = zip(part, values.split([len(sample.old) for sample in part]), strict=True)
            raise not_finite(name, [one.row.ident for one, piece in pieces if not piece.isfinite().all()])


def not_finite(name: str, idents: Sequence[str]) -> TrainingError:
    """The refusal to go on, by the metric's name; `idents` of the rows."""
    shown = ", ".join(idents[:3]) + (", ..." if len(idents) > 3 else "")
    return TrainingError(
        f"{PREFIX}{name} isn't finite over {len(idents)} rows ({shown}): lower algo.lr and algo.value_lr, or set "
        "hardware.dtype=float32"
    )
