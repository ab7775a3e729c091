"""The KL to the policy that training started from, as a penalty of each turn instead of a term of the loss."""

from collections.abc import Sequence

import numpy as np
import torch

from vlm_agents.learn.batches import Shares
from vlm_agents.learn.losses import Estimator
from vlm_agents.learn.samples import build
from vlm_agents.learn.shaping import Metrics, Shaper, with_bonuses
from vlm_agents.learn.update import read_once
from vlm_agents.tensors import ActorCritic, Renderer
from vlm_agents.types import Trajectory


class KlReward(Shaper):
    """Takes `coef` times the estimate of KL(sampler || reference), summed over a turn's tokens, off its reward."""

    def __init__(
        self, model: ActorCritic, renderer: Renderer, coef: float, estimator: Estimator, shares: Shares
    ) -> None:
        self.model, self.renderer, self.coef, self.estimator, self.shares = model, renderer, coef, estimator, shares

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        samples = build(trajectories, self.renderer, thought_coef=1.0)
        if not samples:  # every env broke before the first turn; the learner says so
            return list(trajectories), {}
        with self.model.reference():
            found = read_once(self.model, samples, [range(len(samples))], self.shares)
        log_ratios = np.concatenate(found) - np.concatenate([sample.behaviour for sample in samples])
        tokens = self.estimator(torch.from_numpy(log_ratios)).numpy()
        lengths = [len(turn.reply.token_ids) for one in trajectories for turn in one.turns]
        turns = np.add.reduceat(tokens, np.cumsum([0, *lengths[:-1]]))
        ends = np.cumsum([len(one.turns) for one in trajectories])
        shaped = [
            with_bonuses(one, "kl", (-self.coef * its).tolist())
            for one, its in zip(trajectories, np.split(turns, ends[:-1]), strict=True)
        ]
        return shaped, {"ppo/kl_reference": float(tokens.mean())}
