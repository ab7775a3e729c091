"""The learner: episodes in, a changed model out, by whatever algorithm it is given.

Holds everything that a checkpoint keeps beside the model's own folder: optimizers, iteration, and what shapes rewards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn import credit, groups, signal
from vlm_agents.learn.algorithm import Algorithm
from vlm_agents.learn.batches import Shares, minibatches
from vlm_agents.learn.credit import Credit
from vlm_agents.learn.critic import Critic
from vlm_agents.learn.engine import Engine, TorchEngine, lr_share
from vlm_agents.learn.samples import Sample, build, credited, usable
from vlm_agents.learn.shaping import Metrics, Shaper
from vlm_agents.learn.update import PREFIX, Objective, Pass, go_through, mismatch_kl, not_finite, read_once
from vlm_agents.progress import track
from vlm_agents.tensors import ActorCritic, Renderer
from vlm_agents.types import Trajectory


class Learner:
    """Trains `model` for a run of this many iterations; `settings` are those of the optimizers and passes.

    A role's parameters (policy, learned temperature, critic) have an engine of their own, so that their gradients are
    clipped apart. Clipped together, the critic's, which may be a hundred times larger until it has learned the size of
    a return, would shrink the policy's, and Adam would then step too far once it no longer does. (With
    `stop_gradient=false` a part of the critic's gradient is the policy's, and is clipped with it.)
    """

    def __init__(
        self,
        model: ActorCritic,
        renderer: Renderer,
        algorithm: Algorithm,
        settings: AlgoConfig,
        iterations: int,
        shares: Shares,
        shapers: Mapping[str, Shaper] | None = None,
        engine: Callable[[Sequence[Parameter]], Engine] | None = None,
    ) -> None:
        self.model, self.renderer, self.algorithm, self.settings = model, renderer, algorithm, settings
        self.iterations, self.shares, self.shapers = iterations, shares, shapers or {}
        self.iteration = 0
        alone = partial(
            TorchEngine, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm, world=shares.world
        )
        roles = {role: parameters for role, parameters in model.parameters_by_role().items() if parameters}
        value = roles.pop("value", None)
        self.engines: dict[str, Engine] = {
            role: (engine or alone if role == "policy" else alone)(parameters) for role, parameters in roles.items()
        }
        self.critic = self._critic(None if value is None else alone(value))
        first, *others = algorithm.terms
        of_critic = [(settings.value_coef, self.critic.term)] if self.critic else []
        self.objective = Objective([first, *of_critic, *others], algorithm.average)

    def _critic(self, engine: TorchEngine | None) -> Critic | None:
        """Where credit asks for one, and there is something to train."""
        settings, reads = self.settings, self.algorithm.credit.reads
        if reads == "nothing" or engine is None:
            return None
        return Critic(
            self.model.value,
            engine,
            rate=partial(self._rate, settings.value_lr, first=0),
            coef=settings.value_coef,
            epochs=settings.value_epochs,
            minibatch_turns=settings.minibatch_turns,
            warmup=min(settings.value_warmup, self.iterations - 1),  # never the last, which would leave the policy none
            by_token=reads == "tokens",
            world=self.shares.world,
        )

    # ---- an iteration ------------------------------------------------------------------------------------------------
    def shape(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        """The episodes with what the shapers add to their rewards: those to learn from, and to record."""
        shaped, metrics = list(trajectories), Metrics()
        for shaper in self.shapers.values():
            shaped, told = shaper.reward(shaped)
            metrics |= told
        return shaped, metrics

    def kept(self, episodes: Sequence[Trajectory], wanted: int) -> list[Trajectory]:
        """The usable episodes that the algorithm's filters let through: whole groups, until there are as many as
        `wanted`; without filters all of them.

        TrainingError where none is usable.
        """
        found, filters = groups.grouped(usable(episodes)), self.algorithm.filters
        for choose in filters:
            found = choose(found)
        before = np.cumsum([0, *map(len, found)])
        chosen = [group for group, there in zip(found, before, strict=False) if there < wanted or not filters]
        return list(chain.from_iterable(chosen))

    def learn(self, trajectories: Sequence[Trajectory], wanted: int, rng: np.random.Generator) -> Metrics:
        """One iteration, of episodes that `shape` gave, of which as many as `wanted` are kept.

        TrainingError where nothing can be trained on, or at the first number that isn't finite.
        """
        kept = self.kept(trajectories, wanted)
        found = {"kept": float(len(kept)), "updates": 0.0} if self.algorithm.filters else {}
        if kept:
            earned, normal = self._credit(trajectories, kept)
            samples = credited(build(kept, self.renderer, self.settings.thought_coef), kept, normal)
            found |= self._update(samples, rng) | credit.figures(earned)
        no_advantage = self.algorithm.credit.reads == "nothing" and found.get("zero_advantage") == 1
        found |= signal.figures(kept, self.settings.gamma, no_advantage) | groups.figures(usable(trajectories))
        metrics = {f"{PREFIX}{name}": value for name, value in found.items()}
        for shaper in self.shapers.values():
            metrics |= shaper.learn(trajectories, rng)
        self.iteration += 1
        return metrics

    def _credit(
        self, trajectories: Sequence[Trajectory], kept: Sequence[Trajectory]
    ) -> tuple[list[Credit], list[Credit]]:
        """What the kept ones of these episodes earned: as the rule has it, and as it is trained on."""
        episodes = usable(trajectories) if self.settings.credit_over == "played" else kept
        rule = self.algorithm.credit
        if self.algorithm.warming and self.warming:
            rule = self.algorithm.warming
        values = {"nothing": lambda _: [], "turns": credit.sampled_values, "tokens": self._token_values}[rule.reads]
        earned = rule(episodes, values(episodes), self.iteration / self.iterations)
        credit.check(earned, episodes, rule.reads)
        normal = credit.normalised(earned) if self.algorithm.normalise else earned
        places = {id(episode): place for place, episode in enumerate(episodes)}
        at = [places[id(episode)] for episode in kept]
        return [earned[place] for place in at], [normal[place] for place in at]

    def _token_values(self, episodes: Sequence[Trajectory]) -> list[np.ndarray]:
        """[k] of each: what the critic says before each of its reply tokens."""
        samples = build(episodes, self.renderer, 1.0)
        plan = [range(len(samples))]
        with self.whole():
            found = read_once(self.model, samples, plan, self.shares, lambda scores: self.model.value(scores.states))
        ends = np.cumsum([sum(credit.lengths_of(episode)) for episode in episodes])
        return np.split(np.concatenate(found), ends[:-1])

    # ---- the update --------------------------------------------------------------------------------------------------
    @property
    def warming(self) -> bool:
        """Does the critic learn alone in this iteration?"""
        return self.critic is not None and self.critic.warming(self.iteration)

    def _update(self, samples: Sequence[Sample], rng: np.random.Generator) -> Metrics:
        """Metrics are means over all turns of all passes.

        `ratio_at_start` is the ratio furthest from 1 in the first mini-batch, before any step: what is trained is what
        was sampled only where it is 1. A model that isn't `exact` reads the rows once more for that, and the old
        log-probs are then its own instead of the sampler's. `mismatch_kl` says how far the two are apart, over the
        first mini-batch, or over all turns of a model that isn't exact. Once a mini-batch's KL passes `target_kl` the
        remaining updates are skipped. While the critic warms up the model reads the rows once, without a step.
        """
        settings, lengths = self.settings, [len(sample.row.spans) for sample in samples]
        epochs = 1 if self.warming else settings.epochs
        plan = [minibatches(lengths, settings.minibatch_turns, rng) for _ in range(epochs)]
        samples = self._annotated(samples, plan[0])
        mismatch = None if self.model.exact else mismatch_kl(samples)
        self._refuse_mismatch(mismatch or 0.0)
        passes, norms = self._passes([[samples[index] for index in part] for part in chain.from_iterable(plan)])
        if self.critic:
            # of the first epoch: it has each turn once, wherever a later one was cut short
            read = list(chain.from_iterable(one.read for one in passes[: len(plan[0])]))
            for norm in self.critic.fit(read, self.iteration, rng):
                _refuse_norm("value", norm, samples)
        ratios, turns = passes[0].seen["ratio"], [one.turns for one in passes]
        mismatch = passes[0].mean("approx_kl") if mismatch is None else mismatch
        self._refuse_mismatch(mismatch)
        return {
            "ratio_at_start": float(ratios[(ratios - 1).abs().argmax()]),
            "mismatch_kl": mismatch,
            "updates": float(len(norms)),
            "lr": self.rate("policy"),
            **{f"{role}_grad_norm": float(np.mean([norm[role] for norm in norms])) for role in (norms or [{}])[0]},
            **{
                name: float(np.average([one.mean(name) for one in passes], weights=turns))
                for name in passes[0].seen
                if name != "ratio"
            },
        }

    def _annotated(self, samples: Sequence[Sample], plan: Sequence[Sequence[int]]) -> list[Sample]:
        """The samples with what only passes of the update can tell, each where it is asked for."""
        read = partial(read_once, self.model, samples, plan, self.shares)
        with self.whole():
            if not self.model.exact:
                samples = [replace(sample, old=own) for sample, own in zip(samples, read(), strict=True)]
            if self.settings.kl_coef:
                with self.model.reference():
                    found = read()
                samples = [replace(sample, reference=its) for sample, its in zip(samples, found, strict=True)]
        return list(samples)

    def _passes(self, parts: Sequence[Sequence[Sample]]) -> tuple[list[Pass], list[Metrics]]:
        """One pass and, but where the critic learns alone, one step a mini-batch; and the steps' gradient norms."""
        through = partial(
            go_through,
            self.model,
            objective=self.objective,
            critic=self.critic,
            shares=self.shares,
            backward=None if self.warming else self._backward,
            even=any(engine.even for engine in self.engines.values()),
        )
        passes: list[Pass] = []
        norms: list[Metrics] = []
        for part in track(parts, "update", len(parts), "mini-batches"):
            if self.warming:
                with self.whole():
                    passes.append(through(part))
                continue
            passes.append(through(part))
            norms.append(self._step(part))
            if self.settings.target_kl is not None and passes[-1].mean("approx_kl") > self.settings.target_kl:
                break
        return passes, norms

    def whole(self) -> AbstractContextManager[None]:
        """Within it all weights are there, and passes without gradient need no other rank."""
        policy = self.engines.get("policy")
        return policy.whole() if policy else nullcontext()

    def _backward(self, loss: Tensor) -> None:
        """Through the whole graph, whoever's parameters are in it."""
        policy = self.engines.get("policy")
        policy.backward(loss) if policy else loss.backward()

    def _step(self, samples: Sequence[Sample]) -> Metrics:
        """One step of every role; the heads first: where one of them fails, the policy hasn't moved."""
        steps = {role: partial(engine.step, self.rate(role)) for role, engine in self.engines.items()}
        if self.critic:
            steps["value"] = partial(self.critic.step, self.iteration)
        norms = {}
        for role in reversed(steps):
            norms[role] = steps[role]()
            _refuse_norm(role, norms[role], samples)
        return norms

    def rate(self, role: str) -> float:
        """Learning rate in this iteration. The schedule of all but the critic begins once it has warmed up."""
        full = self.settings.lr if role == "policy" else self.settings.value_lr
        return self._rate(full, self.iteration, self.critic.warmup if self.critic else 0)

    def _rate(self, full: float, iteration: int, first: int) -> float:
        settings = self.settings
        share = lr_share(iteration - first, self.iterations - first, settings.warmup_updates, settings.min_lr_ratio)
        return full * share

    def _refuse_mismatch(self, kl: float) -> None:
        bound = self.settings.max_mismatch_kl
        if bound is not None and kl > bound:
            raise TrainingError(
                f"{PREFIX}mismatch_kl={kl:.3g} nats a turn passes algo.max_mismatch_kl={bound:g}: the policy that is "
                "trained isn't the one that sampled. Set hardware.dtype=float32, or algo.correction=truncate and a "
                "higher bound. With stage.staleness=1 the last update is part of it: lower algo.lr, or set "
                "stage.staleness=0"
            )

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    @property
    def _by_role(self) -> Mapping[str, Engine | Critic]:
        """What is trained."""
        return {**self.engines, "value": self.critic} if self.critic else self.engines

    def state_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "engines": {role: one.state_dict() for role, one in self._by_role.items()},
            "shapers": {name: shaper.state_dict() for name, shaper in self.shapers.items()},
            "credit": getattr(self.algorithm.credit, "state_dict", dict)(),
        }

    def save(self, folder: Path) -> None:
        """What engines keep in parts, a part a rank: to be called by all of them."""
        for engine in self.engines.values():
            engine.save(folder)

    def load(self, folder: Path) -> None:
        for engine in self.engines.values():
            engine.load(folder)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iteration = state["iteration"]
        for role, one in self._by_role.items():
            one.load_state_dict(state["engines"][role])
        for name, shaper in self.shapers.items():
            shaper.load_state_dict(state["shapers"][name])
        getattr(self.algorithm.credit, "load_state_dict", dict)(state.get("credit", {}))


def _refuse_norm(role: str, norm: float, samples: Sequence[Sample]) -> None:
    if not math.isfinite(norm):
        raise not_finite(f"{role}_grad_norm", [sample.row.ident for sample in samples])
