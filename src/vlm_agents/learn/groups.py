"""Groups, the plays of one start, and which of them are learned from. Plain episodes; knows no model.

A filter takes groups and gives those, or those of their members, that are kept. It reads the rewards that are trained
on, bonuses included, but for `differing_outcomes`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vlm_agents.types import Trajectory

Group = list[Trajectory]
Filter = Callable[[Sequence[Group]], list[Group]]
TOLERANCE = 1e-6  # of rewards and returns: what differs by less is rounding


def grouped(episodes: Sequence[Trajectory]) -> list[Group]:
    """The episodes by their seed, in the order in which the seeds come."""
    groups: dict[int, Group] = {}
    for episode in episodes:
        groups.setdefault(episode.seed, []).append(episode)
    return list(groups.values())


def env_reward(episode: Trajectory) -> float:
    return float(sum(turn.step.reward for turn in episode.turns))


def differing_outcomes(groups: Sequence[Group]) -> list[Group]:
    """Those whose members the env paid differently (dynamic sampling, DAPO, arXiv 2503.14476)."""
    return [group for group in groups if np.ptp([env_reward(member) for member in group]) > TOLERANCE]


def differing_rewards(groups: Sequence[Group]) -> list[Group]:
    """Those whose members differ in the reward that is trained on: a group that always succeeds stays where a bonus
    tells its members apart (the partial dynamic filtering of PyVision-RL)."""
    return [group for group in groups if spread(group) > TOLERANCE]


def unbroken(groups: Sequence[Group]) -> list[Group]:
    """Without the members whose interaction broke: no legal action at all, or a prompt that became too long."""
    return _members(groups, lambda member: member.stop not in ("invalid", "too_long"))


def not_overlong(groups: Sequence[Group]) -> list[Group]:
    """Without the members one of whose replies was cut off at its limit."""
    return _members(groups, lambda member: all(turn.reply.finish == "stop" for turn in member.turns))


def largest_variance(share: float) -> Filter:
    """The fewest groups that hold this share of the sum of the groups' variances (RAGEN-2's top-p)."""

    def keep(groups: Sequence[Group]) -> list[Group]:
        variances = np.array([spread(group) ** 2 for group in groups])
        order = np.argsort(-variances, kind="stable")
        # a group is kept while those before it hold less than the share, and it has any
        before = np.cumsum(variances[order]) - variances[order]
        kept = order[(before < share * variances.sum() * (1 - 1e-12)) & (variances[order] > TOLERANCE**2)]
        return [groups[index] for index in sorted(kept)]

    return keep


def by_spread(groups: Sequence[Group]) -> list[Group]:
    """All of them, the largest spread first: where more were played than are kept, the hardest to call stay
    (oversample, filter, rank; PyVision-RL)."""
    return sorted(groups, key=spread, reverse=True)


def spread(group: Group) -> float:
    """Standard deviation of the members' returns."""
    return float(np.std([member.total_reward for member in group])) if group else 0.0


def _members(groups: Sequence[Group], sound: Callable[[Trajectory], bool]) -> list[Group]:
    kept = [[member for member in group if sound(member)] for group in groups]
    return [group for group in kept if group]


def figures(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """How far the members of a group differ, by the returns that are trained on; nothing where none has a second."""
    spreads = [spread(group) for group in grouped(episodes) if len(group) > 1]
    if not spreads:
        return {}
    varied = float(np.mean([one > TOLERANCE for one in spreads]))
    return {"group_std": float(np.mean(spreads)), "varied_groups": varied}
