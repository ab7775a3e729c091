"""The learner: episodes in, a changed model out. One iteration of PPO by turn.

Holds everything that a checkpoint keeps beside the model's own folder: optimizers, iteration, and what shapes rewards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from vlm_agents.config import AlgoConfig
from vlm_agents.learn import averages, credit, losses, signal
from vlm_agents.learn.batches import minibatches
from vlm_agents.learn.critic import Critic
from vlm_agents.learn.engine import TorchEngine, lr_share
from vlm_agents.learn.samples import Sample, build, usable
from vlm_agents.learn.update import Objective, Pass, go_through, mismatch_kl, not_finite, rescored, with_references
from vlm_agents.progress import track
from vlm_agents.tensors import ActorCritic, Renderer
from vlm_agents.types import Trajectory

Metrics = dict[str, float]


class Shaper(Protocol):
    """Adds to the rewards of an iteration's episodes before they are learned from."""

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]: ...

    def learn(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> Metrics:
        """From the same episodes, after the policy has."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Learner:
    """Trains `model` for a run of this many iterations.

    A role's parameters (policy, learned temperature, critic) have an engine of their own, so that their gradients are
    clipped apart. Clipped together, the critic's, which may be a hundred times larger until it has learned the size of
    a return, would shrink the policy's, and Adam would then step too far once it no longer does. (With
    `stop_gradient=false` a part of the critic's gradient is the policy's, and is clipped with it.)
    """

    def __init__(
        self,
        model: ActorCritic,
        renderer: Renderer,
        algo: AlgoConfig,
        iterations: int,
        tokens_per_microbatch: int,
        shapers: Mapping[str, Shaper] | None = None,
    ) -> None:
        self.model, self.renderer, self.algo = model, renderer, algo
        self.iterations, self.tokens_per_microbatch, self.shapers = iterations, tokens_per_microbatch, shapers or {}
        self.iteration = 0
        self.engines = {
            role: TorchEngine(parameters, algo.weight_decay, algo.max_grad_norm)
            for role, parameters in model.parameters_by_role().items()
            if parameters
        }
        warmup = min(algo.value_warmup, iterations - 1)  # never the last, which would leave the policy none
        self.critic = Critic(model.value, algo.value_epochs, algo.minibatch_turns, warmup)
        self.objective = Objective(self._terms(), averages.over_turns)

    def _terms(self) -> list[tuple[float, losses.Loss]]:
        algo = self.algo
        terms = [
            (1.0, losses.clipped(algo.clip, algo.clip)),
            (algo.value_coef, self.critic.term),
            (algo.entropy_coef, losses.entropy_bonus),
        ]
        if "temperature" in self.engines:
            terms.append((algo.turn_entropy_coef, losses.turn_entropy(algo.turn_entropy)))
        if algo.kl_coef:
            terms.append((algo.kl_coef, losses.reference_kl))
        return terms

    def shape(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        """The episodes with what the shapers add to their rewards: those to learn from, and to record."""
        shaped, metrics = list(trajectories), Metrics()
        for shaper in self.shapers.values():
            shaped, told = shaper.reward(shaped)
            metrics |= told
        return shaped, metrics

    def learn(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> Metrics:
        """One iteration, of episodes that `shape` gave.

        TrainingError where nothing can be trained on, or at the first number that isn't finite.
        """
        episodes = usable(trajectories)
        # a critic that knows nothing yet first learns what really came: else its own guesses would be mixed in
        lam = 1.0 if self.critic.warming(self.iteration) else self.algo.gae_lambda
        earned = credit.gae_by_turn(episodes, self.algo.gamma, lam)
        samples = build(episodes, credit.normalised(earned), self.renderer, self.algo.thought_coef)
        metrics = self._update(samples, rng) | credit.figures(earned) | signal.figures(episodes, self.algo.gamma)
        for shaper in self.shapers.values():
            metrics |= shaper.learn(trajectories, rng)
        self.iteration += 1
        return metrics

    def _update(self, samples: Sequence[Sample], rng: np.random.Generator) -> Metrics:
        """Metrics are means over all turns of all passes.

        `ppo/ratio_at_start` is the ratio furthest from 1 in the first mini-batch, before any step: what is trained is
        what was sampled only where it is 1. A model that isn't `exact` reads the rows once more for that, and the old
        log-probs are then its own instead of the sampler's. `ppo/mismatch_kl` says how far the two are apart, over the
        first mini-batch, or over all turns of a model that isn't exact. Once a mini-batch's KL passes `target_kl` the
        remaining updates are skipped. While the critic warms up the model reads the rows once, without a step.
        """
        algo, model, warming = self.algo, self.model, self.critic.warming(self.iteration)
        epochs = [minibatches(samples, algo.minibatch_turns, rng) for _ in range(1 if warming else algo.epochs)]
        mismatch = None
        if not model.exact:
            own = rescored(model, epochs[0], self.tokens_per_microbatch)
            mismatch = mismatch_kl(samples, own)
            samples, epochs = _exchanged(samples, epochs, {one: replace(one, old=own[one]) for one in samples})
        if algo.kl_coef:
            samples, epochs = _exchanged(samples, epochs, with_references(model, epochs[0], self.tokens_per_microbatch))
        through = partial(
            go_through,
            model,
            objective=self.objective,
            critic=self.critic,
            tokens_per_microbatch=self.tokens_per_microbatch,
            backward=None if warming else self._backward,
        )
        passes: list[Pass] = []
        norms: list[dict[str, float]] = []
        for minibatch in track(chain.from_iterable(epochs), "update", sum(map(len, epochs)), "mini-batches"):
            passes.append(through(minibatch))
            if warming:
                continue
            norms.append(self._step(tuple(self.engines), minibatch))
            if algo.target_kl is not None and passes[-1].mean("approx_kl") > algo.target_kl:
                break
        # of the first epoch: it has each turn once, wherever a later one was cut short
        read = chain.from_iterable(one.read for one in passes[: len(epochs[0])])
        self.critic.fit(list(read), partial(self._fit_critic, samples), rng)
        ratios = passes[0].seen["ratio"]
        turns = [one.turns for one in passes]
        return {
            "ppo/ratio_at_start": float(ratios[(ratios - 1).abs().argmax()]),
            "ppo/mismatch_kl": passes[0].mean("approx_kl") if mismatch is None else mismatch,
            "ppo/updates": float(len(norms)),
            "ppo/lr": self.rate("policy"),
            **{f"ppo/{role}_grad_norm": float(np.mean([norm[role] for norm in norms])) for role in (norms or [{}])[0]},
            **{
                f"ppo/{name}": float(np.average([one.mean(name) for one in passes], weights=turns))
                for name in passes[0].seen
                if name != "ratio"
            },
        }

    def rate(self, role: str) -> float:
        """Learning rate in this iteration. The schedule of all but the critic begins once it has warmed up."""
        algo, first = self.algo, 0 if role == "value" else self.critic.warmup
        full = algo.lr if role == "policy" else algo.value_lr
        share = lr_share(self.iteration - first, self.iterations - first, algo.warmup_updates, algo.min_lr_ratio)
        return full * share

    def _backward(self, loss: Tensor) -> None:
        next(iter(self.engines.values())).backward(loss)  # through the whole graph, whoever's parameters are in it

    def _fit_critic(self, samples: Sequence[Sample], loss: Tensor) -> None:
        self.engines["value"].backward(self.algo.value_coef * loss)
        self._step(("value",), samples)

    def _step(self, roles: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        norms = {}
        for role in reversed(roles):  # the heads first: where one of them fails, the policy hasn't moved
            norms[role] = self.engines[role].step(self.rate(role))
            if not math.isfinite(norms[role]):
                raise not_finite(f"ppo/{role}_grad_norm", [sample.row.ident for sample in samples])
        return norms

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "engines": {role: engine.state_dict() for role, engine in self.engines.items()},
            "shapers": {name: shaper.state_dict() for name, shaper in self.shapers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration = state["iteration"]
        for role, engine in self.engines.items():
            engine.load_state_dict(state["engines"][role])
        for name, shaper in self.shapers.items():
            shaper.load_state_dict(state["shapers"][name])


def _exchanged(
    samples: Sequence[Sample], epochs: Sequence[Sequence[Sequence[Sample]]], other: Mapping[Sample, Sample]
) -> tuple[list[Sample], list[list[list[Sample]]]]:
    """The same plan with another sample for each."""
    return [other[one] for one in samples], [[[other[one] for one in part] for part in epoch] for epoch in epochs]
