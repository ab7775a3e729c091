"""The critic: what return to expect before a turn, or a token. It learns from what came, with an optimizer of its own,
beside the policy and in its own passes over what it has read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.losses import Term, value_loss
from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Scores
from vlm_agents.world import ALONE, World


class Read(NamedTuple):
    """What a critic read in a sample, and should have expected there."""

    states: Tensor  # [n H] detached
    returns: Tensor  # [n]
    turns: int


class Critic:
    """`value` maps [n H] states to [n] expected returns, and `engine` trains it at `rate`, of each iteration.

    It reads the state before each turn's reply or, with `by_token`, before each of its tokens. `coef` is the weight of
    its loss. In the first `warmup` iterations it learns alone: by what a critic that knows nothing expects, normalised
    advantages would punish the first turns of every episode.
    """

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        engine: TorchEngine,
        rate: Callable[[int], float],
        coef: float,
        epochs: int,
        minibatch_turns: int,
        warmup: int,
        by_token: bool = False,
        world: World = ALONE,
    ) -> None:
        self.value, self.engine, self.rate, self.coef, self.world = value, engine, rate, coef, world
        self.epochs, self.minibatch_turns, self.warmup, self.by_token = epochs, minibatch_turns, warmup, by_token

    def warming(self, iteration: int) -> bool:
        """Does it learn alone in this iteration?"""
        return iteration < self.warmup

    def term(self, scores: Scores, targets: Targets) -> Term:
        """The squared error as a term of the objective: through it a critic may move the policy's backbone too."""
        states, returns = self._read_at(scores, targets)
        loss = value_loss(self.value(states), returns)
        loss = loss if self.by_token else loss[targets.turn]
        return Term(loss, {"value_loss": loss})

    def read(self, scores: Scores, targets: Targets) -> list[Read]:
        """What it read in each of the samples of a micro-batch; on the host where other ranks need it too."""
        states, returns = self._read_at(scores, targets)
        turns = targets.row[targets.first].bincount().tolist()
        lengths = targets.row.bincount().tolist() if self.by_token else turns
        states, returns = (one.detach() if self.world.ranks == 1 else one.detach().cpu() for one in (states, returns))
        return [Read(*its) for its in zip(states.split(lengths), returns.split(lengths), turns, strict=True)]

    def fit(self, read: Sequence[Read], iteration: int, rng: np.random.Generator) -> Iterator[float]:
        """Epochs of the head alone, and the gradient norm of each step. The model isn't run."""
        states, returns = (torch.cat(parts) for parts in ([one.states for one in read], [one.returns for one in read]))
        if self.world.ranks > 1:
            device = self.engine.parameters[0].device
            states, returns = states.to(device), returns.to(device)
        number = max(1, round(sum(one.turns for one in read) / self.minibatch_turns))
        for _ in range(self.epochs):
            order = torch.from_numpy(rng.permutation(len(returns))).to(returns.device)
            for part in order.tensor_split(number):
                own = part[self.world.rank :: self.world.ranks]
                loss = value_loss(self.value(states[own]), returns[own]).sum() / len(part)
                self.engine.backward(self.coef * loss)
                yield self.step(iteration)

    def step(self, iteration: int) -> float:
        """One step along the gradient that has come so far; its norm, before which nothing was moved if not finite."""
        return self.engine.step(self.rate(iteration))

    def _read_at(self, scores: Scores, targets: Targets) -> tuple[Tensor, Tensor]:
        if self.by_token:
            return scores.states, targets.returns
        return scores.states[targets.first], targets.returns[targets.first]

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)
