"""One PPO iteration: epochs of shuffled mini-batches, each a sum of micro-batches and one optimizer step; then epochs
of the critic's head alone, which is all there is while the critic warms up.

Takes the rows of `batch`, leaves the model changed, and returns what is worth a curve. It collects nothing, logs
nothing and saves nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.advantages import explained_variance
from vlm_agents.learn.batch import collate, microbatches, minibatches, to_device
from vlm_agents.learn.engine import Engine
from vlm_agents.learn.losses import k3, ppo_policy_loss, reference_kl, turn_entropy_loss, turn_mean, value_loss
from vlm_agents.progress import track
from vlm_agents.tensors import ActorCritic, Renderer, Row, Tokens

# Keyed by the identity of a row: idents repeat where one seed is played twice, and rows hold arrays, so have no hash.
Reference = Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class Pass:
    """What is left of a pass over M turns."""

    terms: dict[str, Tensor]  # [M] each, on the host
    states: Tensor  # [M H] what the critic read
    returns: Tensor  # [M] what it should have foretold


def update(
    model: ActorCritic,
    renderer: Renderer,
    engine: Engine,
    rows: Sequence[Row],
    algo: AlgoConfig,
    rng: np.random.Generator,
    tokens_per_microbatch: int,
) -> dict[str, float]:
    """Train on `rows` and end the engine's iteration; metrics are means over all turns of all passes.

    `ppo/ratio_at_start` is the ratio furthest from 1 in the first mini-batch, before any step: what is trained is what
    was sampled only where it is 1. A model that isn't `exact` reads the rows once more for that, and the old log-probs
    are then its own instead of the sampler's. `ppo/mismatch_kl` says how far the two are apart: the k3 estimate of
    KL(sampler || update) of a turn before any step, over the first mini-batch, or over all turns of a model that isn't
    exact. Once a mini-batch's KL passes `target_kl` the remaining updates are skipped. While the engine trains the
    critic alone, the model reads the rows once, without a gradient or a step. What the critic's head goes over in the
    end counts in no metric. Raises TrainingError at the first loss or gradient that isn't finite.
    """
    epochs = [minibatches(rows, algo.minibatch_turns, rng) for _ in range(1 if engine.critic_only else algo.epochs)]
    mismatch = None
    if not model.exact:
        own = rescored(model, renderer, epochs[0], tokens_per_microbatch)
        mismatch = mismatch_kl([(row, own[id(row)]) for row in rows])
        rows = [own[id(row)] for row in rows]
        epochs = [[[own[id(row)] for row in minibatch] for minibatch in epoch] for epoch in epochs]
    reference = reference_logprobs(model, renderer, rows, tokens_per_microbatch) if algo.kl_coef > 0 else None
    passes: list[Pass] = []
    norms: list[dict[str, float]] = []
    for minibatch in track(chain.from_iterable(epochs), "update", sum(map(len, epochs)), "mini-batches"):
        passes.append(accumulate(model, renderer, engine, minibatch, algo, reference, tokens_per_microbatch))
        if engine.critic_only:
            continue
        norms.append(_step(engine, minibatch, algo))
        if algo.target_kl is not None and passes[-1].terms["approx_kl"].mean() > algo.target_kl:
            break
    # of the first epoch: it has each turn once, wherever a later one was cut short
    fit_critic(model, engine, passes[: len(epochs[0])], rows, algo, rng)
    ratios = passes[0].terms["ratio"]
    metrics = {
        "ppo/ratio_at_start": float(ratios[(ratios - 1).abs().argmax()]),
        "ppo/mismatch_kl": float(passes[0].terms["approx_kl"].mean()) if mismatch is None else mismatch,
        "ppo/updates": float(len(norms)),
        "ppo/lr": engine.learning_rate,
    }
    for role in norms[0] if norms else ():
        metrics[f"ppo/{role}_grad_norm"] = float(np.mean([norm[role] for norm in norms]))
    for name in passes[0].terms:
        if name != "ratio":
            metrics[f"ppo/{name}"] = float(torch.cat([part.terms[name] for part in passes]).mean())
    engine.end_iteration()
    return metrics | rollout_metrics(rows)


def accumulate(
    model: ActorCritic,
    renderer: Renderer,
    engine: Engine,
    minibatch: Sequence[Row],
    algo: AlgoConfig,
    reference: Reference | None,
    tokens_per_microbatch: int,
) -> Pass:
    """Forward and, unless the critic alone learns, backward through one mini-batch, in the order of its micro-batches.

    Each micro-batch's sum is divided by the turns of the whole mini-batch, so how it was cut changes nothing.
    """
    turns = sum(len(row.spans) for row in minibatch)
    parts: list[Pass] = []
    for rows in microbatches(minibatch, tokens_per_microbatch):
        with torch.set_grad_enabled(not engine.critic_only):
            loss, part = objective(model, renderer, rows, algo, reference)
        idents = _idents_of_turns(rows)
        for name, values in part.terms.items():
            bad = [ident for ident, value in zip(idents, values.tolist(), strict=True) if not math.isfinite(value)]
            if bad:
                raise _not_finite(f"ppo/{name}", bad, algo)
        if not engine.critic_only:
            engine.backward(loss.sum() / turns)
        parts.append(part)
    return Pass(
        terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        states=torch.cat([part.states for part in parts]),
        returns=torch.cat([part.returns for part in parts]),
    )


def objective(
    model: ActorCritic, renderer: Renderer, rows: Sequence[Row], algo: AlgoConfig, reference: Reference | None
) -> tuple[Tensor, Pass]:
    """What to minimise, [M], and what else is known of the rows' turns, in their order."""
    batch = collate(rows, renderer)
    scores = model.score(batch.tokens)
    batch = to_device(batch, scores.values.device)
    policy = ppo_policy_loss(
        scores.logprobs, batch.old_logprobs, batch.token_weight, batch.turn_of_token, batch.advantages, algo.clip
    )
    value = value_loss(scores.values, batch.returns)
    entropy = turn_mean(scores.entropy, batch.turn_of_token, len(value))
    loss = policy.loss + algo.value_coef * value - algo.entropy_coef * entropy
    terms = {
        "policy_loss": policy.loss,
        "value_loss": value,
        "entropy": entropy,
        "ratio": policy.ratio,
        "approx_kl": policy.approx_kl,
        "clip_fraction": policy.clipped,
    }
    if scores.tempered_entropy is not None and scores.temperature is not None:
        spread = turn_mean(scores.tempered_entropy, batch.turn_of_token, len(value))
        terms |= {"temperature": scores.temperature, "turn_entropy_loss": turn_entropy_loss(spread, algo.turn_entropy)}
        loss = loss + algo.turn_entropy_coef * terms["turn_entropy_loss"]
    if reference is not None:
        reference_of_rows = torch.cat([reference[id(row)] for row in rows])
        terms["kl_reference"] = reference_kl(scores.logprobs, reference_of_rows, batch.turn_of_token, len(value))
        loss = loss + algo.kl_coef * terms["kl_reference"]
    on_host = torch.stack(list(terms.values())).detach().cpu()
    return loss, Pass(dict(zip(terms, on_host, strict=True)), scores.states, batch.returns)


def fit_critic(
    model: ActorCritic,
    engine: Engine,
    passes: Sequence[Pass],
    rows: Sequence[Row],
    algo: AlgoConfig,
    rng: np.random.Generator,
) -> None:
    """Epochs of the critic's head over the states that it has read in `rows`. The model isn't run."""
    states, returns = (torch.cat([getattr(part, name) for part in passes]) for name in ("states", "returns"))
    number = max(1, round(len(returns) / algo.minibatch_turns))
    for _ in range(algo.value_epochs):
        order = torch.from_numpy(rng.permutation(len(returns))).to(returns.device)
        for part in order.tensor_split(number):
            engine.backward(algo.value_coef * value_loss(model.value(states[part]), returns[part]).mean())
            _step(engine, rows, algo)


def reference_logprobs(
    model: ActorCritic, renderer: Renderer, rows: Sequence[Row], tokens_per_microbatch: int
) -> dict[int, Tensor]:
    """Per row, the log-probs of its reply tokens under the reference policy, which no update changes."""
    return by_row(microbatches(rows, tokens_per_microbatch), renderer, model.reference_logprobs)


@torch.no_grad()
def rescored(
    model: ActorCritic, renderer: Renderer, epoch: Sequence[Sequence[Row]], tokens_per_microbatch: int
) -> dict[int, Row]:
    """Per row of an epoch's mini-batches, the row with the log-probs that the update's own passes give now.

    In the micro-batches of that epoch: a row's numbers depend on those that it is padded and summed with.
    """
    parts = chain.from_iterable(microbatches(minibatch, tokens_per_microbatch) for minibatch in epoch)
    own = by_row(parts, renderer, lambda tokens: model.score(tokens).logprobs)
    rows = chain.from_iterable(epoch)
    return {id(row): replace(row, old_logprobs=own[id(row)].cpu().numpy()) for row in rows}


def by_row(parts: Iterable[Sequence[Row]], renderer: Renderer, score: Callable[[Tokens], Tensor]) -> dict[int, Tensor]:
    """Per row of the micro-batches, its reply tokens' share of `score`, [K]."""
    found: dict[int, Tensor] = {}
    for part in parts:
        pieces = score(renderer.collate(part)).split([len(row.old_logprobs) for row in part])
        found.update(zip(map(id, part), pieces, strict=True))
    return found


def mismatch_kl(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Mean over all turns of the k3 estimate of KL(first || second) by the log-probs of two versions of each row."""
    drifts = []
    for sampled, own in pairs:
        lengths = [end - start for start, end in sampled.spans]
        drift = own.old_logprobs.astype(np.float64) - sampled.old_logprobs
        drifts.append(np.add.reduceat(drift, np.cumsum([0, *lengths[:-1]])))
    return float(k3(torch.from_numpy(np.concatenate(drifts))).mean())


def rollout_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """What the rollout's values and returns say, before any update. Raw advantages: normalised ones hide their size."""
    values = np.concatenate([row.old_values for row in rows])
    returns = np.concatenate([row.returns for row in rows])
    return {
        "ppo/explained_variance": explained_variance(values, returns),
        "ppo/advantage_std": float((returns - values).std()),
        "ppo/zero_advantage": float(np.isclose(returns, values, atol=1e-6).mean()),  # share of turns that teach nothing
    }


def _step(engine: Engine, rows: Sequence[Row], algo: AlgoConfig) -> dict[str, float]:
    norms = engine.step()
    for role, norm in norms.items():
        if not math.isfinite(norm):
            raise _not_finite(f"ppo/{role}_grad_norm", _idents_of_turns(rows), algo)
    return norms


def _idents_of_turns(rows: Sequence[Row]) -> list[str]:
    return [row.ident for row in rows for _ in row.spans]


def _not_finite(what: str, idents: Sequence[str], algo: AlgoConfig) -> TrainingError:
    shown = ", ".join(idents[:3]) + (", ..." if len(idents) > 3 else "")
    return TrainingError(
        f"{what} isn't finite over {len(idents)} turns ({shown}): "
        f"lower algo.lr={algo.lr:g} and algo.value_lr={algo.value_lr:g}, or set hardware.dtype=float32"
    )
