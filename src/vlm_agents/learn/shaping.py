"""Bonuses and penalties beside the env's reward. Each is kept under its name; the env's own stays what it was."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_agents.errors import TrainingError
from vlm_agents.types import Advice, Trajectory, Turn

Metrics = dict[str, float]


class Shaper:
    """Adds to the rewards of an iteration's episodes before they are learned from. Most learn and save nothing."""

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        raise NotImplementedError

    def learn(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> Metrics:
        """From the same episodes, after the policy has."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""


def with_bonuses(trajectory: Trajectory, name: str, bonuses: Sequence[float]) -> Trajectory:
    """The episode with a number for each of its turns added to what is trained on, where it isn't 0."""
    turns = (
        replace(turn, bonuses={**turn.bonuses, name: float(bonus)}) if bonus else turn
        for turn, bonus in zip(trajectory.turns, bonuses, strict=True)
    )
    return replace(trajectory, turns=tuple(turns))


def penalised(trajectories: Iterable[Trajectory], penalty: float) -> Iterator[Trajectory]:
    """The episodes, each reply without a legal action charged `penalty`, as the bonus `invalid`."""
    for one in trajectories:
        yield with_bonuses(one, "invalid", [-penalty * (turn.parsed.action is None) for turn in one.turns])


class TurnShaper(Shaper):
    """What can be said of each episode alone: `bonuses` gives a number for each of its turns."""

    def __init__(self, name: str, bonuses: Callable[[Trajectory], Sequence[float]]) -> None:
        self.name, self.bonuses = name, bonuses

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        return [with_bonuses(one, self.name, self.bonuses(one)) for one in trajectories], {}


class CountBonus(Shaper):
    """`coef / sqrt(n)` for reaching a state for the n-th time, by `state_key`: in what the run played before, and in
    the episode itself. What others reach that are played beside it doesn't count yet: equal plays earn the same.

    TrainingError where an env names no states.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef
        self.counts: Counter[str] = Counter()

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], Metrics]:
        shaped, reached = [], Counter[str]()
        for one in trajectories:
            own, bonuses = Counter[str](), []
            for turn in one.turns:
                own[key := self._key(one, turn)] += 1
                bonuses.append(self.coef / math.sqrt(self.counts[key] + own[key]))
            reached += own
            shaped.append(with_bonuses(one, "count", bonuses))
        self.counts += reached
        return shaped, {}

    @staticmethod
    def _key(episode: Trajectory, turn: Turn) -> str:
        if key := turn.step.observation.state_key:
            return key
        raise TrainingError(
            f"{episode.env} names no states (state_key is empty), and algo.count_coef counts them: set "
            "algo.count_coef=0"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = Counter(state["counts"])


def progress(coef: float, gamma: float) -> Callable[[Trajectory], list[float]]:
    """Dense reward for coming nearer to success, from a potential, so that the best policy stays what it was.

    A turn earns `coef * (gamma * potential after - potential before)` (Ng et al. 1999). The potential of a state is
    minus its distance, in expert steps, over that of the episode's start; a state from which the expert knows no way
    counts as the start does, and what comes after the end as 0, so the whole way is worth `coef` where gamma is 1.
    TrainingError where the expert doesn't count steps.
    """

    def bonuses(trajectory: Trajectory) -> list[float]:
        start = trajectory.turns[0].observation.advice if trajectory.turns else None
        if trajectory.turns and (start is None or start.distance is None):
            raise TrainingError(
                f"{trajectory.ident}: the expert doesn't count the steps to success: set algo.progress_coef=0"
            )
        whole = max(1, start.distance or 0) if start else 1
        failed = len(trajectory.turns) - 1 if trajectory.stop == "too_long" else None  # the turn after which it had

        def potential(advice: Advice | None) -> float:
            return -1.0 if advice is None or advice.distance is None else -advice.distance / whole

        return [
            coef
            * (
                (0.0 if turn.step.terminated or place == failed else gamma * potential(turn.step.observation.advice))
                - potential(turn.observation.advice)
            )
            for place, turn in enumerate(trajectory.turns)
        ]

    return bonuses


def tools(coef: float, once: bool = False) -> Callable[[Trajectory], list[float]]:
    """`coef` for each turn that used a tool, where the episode succeeds (PyVision-RL); or `once`, for the last turn
    that had a picture from one (DeepEyes). TrainingError where an env doesn't count `tool_calls` or `tool_pictures`.
    """
    name = "tool_pictures" if once else "tool_calls"

    def bonuses(trajectory: Trajectory) -> list[float]:
        turns = trajectory.turns
        if turns and name not in turns[0].step.metrics:
            setting = "algo.tool_once_coef" if once else "algo.tool_coef"
            raise TrainingError(f"{trajectory.env} doesn't count its {name}: set {setting}=0")
        counts = np.diff([0.0, *(turn.step.metrics[name] for turn in turns)])
        used = [place for place, count in enumerate(counts) if count > 0] if trajectory.success else []
        used = used[-1:] if once else used
        return [coef * (place in used) for place in range(len(turns))]

    return bonuses


def unreadable(coef: float) -> Callable[[Trajectory], list[float]]:
    """A penalty of `coef`, at the end of an episode any of whose replies couldn't be read (DeepEyes' format term)."""

    def bonuses(trajectory: Trajectory) -> list[float]:
        broken = any(turn.parsed.error is not None for turn in trajectory.turns)
        return [0.0] * (len(trajectory.turns) - 1) + [-coef * broken] * bool(trajectory.turns)

    return bonuses


def overlong(coef: float, limit: int, share: float) -> Callable[[Trajectory], list[float]]:
    """A penalty that rises from 0 to `coef` over the last `share` of the `limit` of tokens (DAPO's soft punishment)."""
    buffer = share * limit

    def bonuses(trajectory: Trajectory) -> list[float]:
        lengths = (len(turn.reply.token_ids) for turn in trajectory.turns)
        return [-coef * min(1.0, max(0.0, (length - (limit - buffer)) / buffer)) for length in lengths]

    return bonuses
