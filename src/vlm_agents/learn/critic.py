"""The critic: what return to expect before a turn. Learns from what came, in its own passes over what it has read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm_agents.learn.losses import Term, value_loss
from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Scores


class Read(NamedTuple):
    """What a critic read, and should have expected there."""

    states: Tensor  # [M H] detached
    returns: Tensor  # [M]


class Critic:
    """Over the state before each turn's reply; `value` maps [M H] states to [M] expected returns."""

    def __init__(self, value: Callable[[Tensor], Tensor], epochs: int, minibatch_turns: int, warmup: int) -> None:
        self.value, self.epochs, self.minibatch_turns = value, epochs, minibatch_turns
        self.warmup = warmup

    def warming(self, iteration: int) -> bool:
        """Does it learn alone in this iteration? Without a critic, normalised advantages would punish the first turns
        of every episode."""
        return iteration < self.warmup

    def term(self, scores: Scores, targets: Targets) -> Term:
        """The squared error as a term of the objective: through it a critic may move the policy's backbone too."""
        loss = value_loss(self.value(scores.states[targets.first]), targets.returns[targets.first])[targets.turn]
        return Term(loss, {"value_loss": loss})

    def read(self, scores: Scores, targets: Targets) -> Read:
        return Read(scores.states[targets.first].detach(), targets.returns[targets.first])

    def fit(self, read: Sequence[Read], step: Callable[[Tensor], None], rng: np.random.Generator) -> None:
        """Epochs of the head alone. The model isn't run; `step` minimises a loss."""
        states, returns = (torch.cat(parts) for parts in zip(*read, strict=True))
        number = max(1, round(len(returns) / self.minibatch_turns))
        for _ in range(self.epochs):
            order = torch.from_numpy(rng.permutation(len(returns))).to(returns.device)
            for part in order.tensor_split(number):
                step(value_loss(self.value(states[part]), returns[part]).mean())
