"""Is there anything to learn from in an iteration's episodes? Read off replies and rewards alone; knows no model.

PPO learns from differences: what came after a turn against what the critic, or the other turns, led to expect. So there
is nothing to learn from where

* every reply was illegal: no action of the policy ever reached the env, so whatever rewards differ by isn't its doing;
* no two episodes differ: at each turn that they share they had the same reward, and they came to the same discounted
  return. A critic that isn't flat yet still gives such turns advantages, and they are normalised like any others, so
  the weights do move: by the critic's errors, not by what was played;
* without a critic, no advantage differs from 0: no episode from those of its group, where it is held against them.

Rewards are those that are trained on, with `env.invalid_penalty` and `algo.novelty`'s bonus: a success rate of 0 is no
lack where they differ. One episode alone differs from none, yet a critic compares it with those of earlier iterations:
it counts as something. That there is a difference doesn't say that it can be learned from: seeds may be all that it is.
"""

from collections.abc import Sequence

from vlm_agents.learn.groups import TOLERANCE
from vlm_agents.types import Trajectory

METRIC = "nothing_to_learn"


def figures(episodes: Sequence[Trajectory], gamma: float, no_advantage: bool = False) -> dict[str, float]:
    """METRIC, 1 or 0, of the episodes that are learned from, with the rewards that are trained on; 1 for none.

    `no_advantage`: no critic has a say, and all advantages are 0.
    """
    return {METRIC: float(no_advantage or all_illegal(episodes) or all_alike(episodes, gamma))}


def all_illegal(episodes: Sequence[Trajectory]) -> bool:
    return all(turn.parsed.action is None for episode in episodes for turn in episode.turns)


def all_alike(episodes: Sequence[Trajectory], gamma: float) -> bool:
    """Are there two episodes or more, and does none differ from another in its rewards?"""
    if len(episodes) < 2:
        return False
    rewards = [[turn.reward for turn in episode.turns] for episode in episodes]
    returns = [sum(gamma**at * reward for at, reward in enumerate(row)) for row in rewards]
    shared = [[row[at] for row in rewards if at < len(row)] for at in range(max(map(len, rewards)))]
    return all(max(column) - min(column) <= TOLERANCE for column in (returns, *shared))
