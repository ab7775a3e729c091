"""The KL to the policy that training started from, as a penalty of each turn instead of a term of the loss."""

from collections.abc import Sequence

import numpy as np

from vlm_agents.learn.batches import Shares
from vlm_agents.learn.samples import build
from vlm_agents.learn.shaping import Metrics, Shaper, with_bonuses
from vlm_agents.learn.update import read_once
from vlm_agents.tensors import ActorCritic, Renderer
from vlm_agents.types import Trajectory


class KlReward(Shaper):
    """Takes `coef` times log(sampler/reference), summed over a turn's tokens, off its reward.

    That is the estimator of the KL called k1: what the reference would have said more often is paid for. The others
    (k2, k3) charge all that differs, in whichever direction: as rewards they push away from the reference.
    """

    def __init__(self, model: ActorCritic, renderer: Renderer, coef: float, shares: Shares) -> None:
        self.model, self.renderer, self.coef, self.shares = model, renderer, coef, shares

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        samples = build(trajectories, self.renderer, thought_coef=1.0)
        if not samples:  # every env broke before the first turn; the learner says so
            return list(trajectories), {}
        with self.model.reference():
            found = read_once(self.model, samples, [range(len(samples))], self.shares)
        tokens = np.concatenate([sample.behaviour for sample in samples]) - np.concatenate(found)
        lengths = [len(turn.reply.token_ids) for one in trajectories for turn in one.turns]
        turns = np.add.reduceat(tokens, np.cumsum([0, *lengths[:-1]]))
        ends = np.cumsum([len(one.turns) for one in trajectories])
        shaped = [
            with_bonuses(one, "kl", (-self.coef * its).tolist())
            for one, its in zip(trajectories, np.split(turns, ends[:-1]), strict=True)
        ]
        return shaped, {"ppo/kl_reference": float(tokens.mean())}
