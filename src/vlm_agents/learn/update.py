"""One PPO iteration: epochs of shuffled mini-batches, each a sum of micro-batches and one optimizer step; then epochs
of the critic's head alone.

Takes the rows of `batch`, leaves the model changed, and returns what is worth a curve. It collects nothing, logs
nothing and saves nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.advantages import explained_variance
from vlm_agents.learn.batch import collate, microbatches, minibatches, to_device
from vlm_agents.learn.engine import Engine
from vlm_agents.learn.losses import ppo_policy_loss, reference_kl, turn_entropy_loss, turn_mean, value_loss
from vlm_agents.tensors import ActorCritic, Renderer, Row

# Keyed by the identity of a row: idents repeat where one seed is played twice, and rows hold arrays, so have no hash.
Reference = Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """Of M turns."""

    loss: Tensor  # [M] what to minimise
    terms: dict[str, Tensor]  # [M] each, detached and on the host
    states: Tensor  # [M H] what the critic read, detached
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
    was sampled only where it is 1. Once a mini-batch's KL passes `target_kl` the remaining updates are skipped. What
    the critic's head goes over in the end counts in no metric. Raises TrainingError at the first loss or gradient that
    isn't finite.
    """
    reference = reference_logprobs(model, renderer, rows, tokens_per_microbatch) if algo.kl_coef > 0 else None
    passes: list[Objective] = []
    norms: list[dict[str, float]] = []
    epochs = [minibatches(rows, algo.minibatch_turns, rng) for _ in range(algo.epochs)]
    for minibatch in (part for epoch in epochs for part in epoch):
        passes.append(accumulate(model, renderer, engine, minibatch, algo, reference, tokens_per_microbatch))
        norms.append(engine.step())
        if not all(map(math.isfinite, norms[-1].values())):
            raise _not_finite("gradient norm", _idents_of_turns(minibatch), algo)
        if algo.target_kl is not None and passes[-1].terms["approx_kl"].mean() > algo.target_kl:
            break
    norm = fit_critic(model, engine, passes[-len(epochs[0]) :], algo, rng)
    if not math.isfinite(norm):
        raise _not_finite("the critic's gradient norm", _idents_of_turns(rows), algo)
    ratios = passes[0].terms["ratio"]
    metrics = {
        "ppo/ratio_at_start": float(ratios[(ratios - 1).abs().argmax()]),
        **{f"ppo/{role}_grad_norm": float(np.mean([norm[role] for norm in norms])) for role in norms[0]},
        "ppo/updates": float(len(norms)),
        "ppo/lr": engine.learning_rate,
    }
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
) -> Objective:
    """Backward through one mini-batch, and its objective, in the order of its micro-batches.

    Each micro-batch's sum is divided by the turns of the whole mini-batch, so how it was cut changes nothing.
    """
    turns = sum(len(row.spans) for row in minibatch)
    parts: list[Objective] = []
    for rows in microbatches(minibatch, tokens_per_microbatch):
        part = objective(model, renderer, rows, algo, reference)
        idents = _idents_of_turns(rows)
        for name, values in part.terms.items():
            bad = [ident for ident, value in zip(idents, values.tolist(), strict=True) if not math.isfinite(value)]
            if bad:
                raise _not_finite(f"ppo/{name}", bad, algo)
        engine.backward(part.loss.sum() / turns)
        parts.append(replace(part, loss=part.loss.detach()))  # or its graph would live on
    return Objective(
        loss=torch.cat([part.loss for part in parts]),
        terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        states=torch.cat([part.states for part in parts]),
        returns=torch.cat([part.returns for part in parts]),
    )


def objective(
    model: ActorCritic, renderer: Renderer, rows: Sequence[Row], algo: AlgoConfig, reference: Reference | None
) -> Objective:
    """Of the rows' turns, in their order."""
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
    return Objective(loss, dict(zip(terms, on_host, strict=True)), scores.states, batch.returns)


def fit_critic(
    model: ActorCritic, engine: Engine, passes: Sequence[Objective], algo: AlgoConfig, rng: np.random.Generator
) -> float:
    """Epochs of the critic's head over the states that it has read; the largest gradient norm. The model isn't run."""
    states, returns = (torch.cat([getattr(part, name) for part in passes]) for name in ("states", "returns"))
    number = max(1, round(len(returns) / algo.minibatch_turns))
    norms = [0.0]
    for _ in range(algo.value_epochs):
        order = torch.from_numpy(rng.permutation(len(returns))).to(returns.device)
        for part in order.tensor_split(number):
            engine.backward(algo.value_coef * value_loss(model.value(states[part]), returns[part]).mean())
            norms.append(engine.step()["value"])
    return float(np.max(norms))  # NaN, if there is one


def reference_logprobs(
    model: ActorCritic, renderer: Renderer, rows: Sequence[Row], tokens_per_microbatch: int
) -> dict[int, Tensor]:
    """Per row, the log-probs of its reply tokens under the reference policy, which no update changes."""
    found: dict[int, Tensor] = {}
    for part in microbatches(rows, tokens_per_microbatch):
        logprobs = model.reference_logprobs(renderer.collate(part))
        pieces = logprobs.split([len(row.old_logprobs) for row in part])
        found.update(zip(map(id, part), pieces, strict=True))
    return found


def rollout_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """What the rollout's values and returns say, before any update. Raw advantages: normalised ones hide their size."""
    values = np.concatenate([row.old_values for row in rows])
    returns = np.concatenate([row.returns for row in rows])
    return {
        "ppo/explained_variance": explained_variance(values, returns),
        "ppo/advantage_std": float((returns - values).std()),
        "ppo/zero_advantage": float(np.isclose(returns, values, atol=1e-6).mean()),  # share of turns that teach nothing
    }


def _idents_of_turns(rows: Sequence[Row]) -> list[str]:
    return [row.ident for row in rows for _ in row.spans]


def _not_finite(what: str, idents: Sequence[str], algo: AlgoConfig) -> TrainingError:
    shown = ", ".join(idents[:3]) + (", ..." if len(idents) > 3 else "")
    return TrainingError(
        f"{what} isn't finite over {len(idents)} turns ({shown}): "
        f"lower algo.lr={algo.lr:g} and algo.value_lr={algo.value_lr:g}, or set hardware.dtype=float32"
    )
