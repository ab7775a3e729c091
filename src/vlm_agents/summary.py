"""What came of episodes, in numbers: means over episodes, turns and replies, and success by tag.

Plays nothing, and keeps no episode: they may be more than fit into memory.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vlm_agents.errors import TrainingError
from vlm_agents.metrics import EPISODES
from vlm_agents.types import Trajectory, Turn

GRAM = 4  # tokens: a shorter run comes back in sound text too
COUNTED = {"env_error": "env_errors", "unscored": "unscored"}  # by `Trajectory.stop`
GAME = "game"  # the tag that names what is played, and no kind of it
TAG_VALUES = 16  # of a tag; one with more of them names each episode rather than kinds of them


def summarise(trajectories: Iterable[Trajectory], prefix: str = "rollout") -> dict[str, float]:
    """Means over episodes, turns or replies; `env_errors` and `unscored` are counts, and those episodes are in no mean.

    `reply_tokens` and `entropy` are there if a model sampled; `steps_over_expert`, the turns that a solved episode took
    over those that the expert would need, if an expert counts them; and the env's own metrics of an episode's last
    step, under their names, but for those that mean something else here. TrainingError if no episode is usable.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    counts, errors = dict.fromkeys(COUNTED.values(), 0.0), list[str]()
    for trajectory in trajectories:
        if not trajectory.known:
            counts[COUNTED[trajectory.stop]] += 1
            errors.append(str(trajectory.error))
            continue
        for name, found in _figures(trajectory).items():
            values[name] += found
    if not values:
        told = f"the first ended with: {errors[0]}. Mend what that names" if errors else "none was played"
        raise TrainingError(f"of none of {len(errors)} episodes is it known what came of it: {told}")
    means = {name: float(np.mean(found)) for name, found in values.items() if found}
    return {f"{prefix}/{name}": value for name, value in {**means, **counts}.items()}


def _figures(trajectory: Trajectory) -> dict[str, list[float]]:
    """What an episode, each of its turns or each of its replies adds to a mean."""
    turns = trajectory.turns
    sampled = [turn.reply for turn in turns if turn.reply.token_ids and turn.reply.entropy is not None]
    advice = turns[0].observation.advice if turns else None
    needed = advice.distance if advice is not None and trajectory.success else None
    own = turns[-1].step.metrics if turns else {}
    return {name: [value] for name, value in own.items() if name not in EPISODES} | {
        "success": [trajectory.success],
        "return": [trajectory.total_reward],
        "positive_return": [trajectory.total_reward > 0],
        "episode_length": [len(turns)],
        "steps_over_expert": [len(turns) / needed] if needed else [],
        "time_limit_rate": [any(turn.step.truncated for turn in turns[-1:])],
        "too_long_rate": [trajectory.stop == "too_long"],
        "failure_rate": [trajectory.stop == "failure"],
        "all_invalid_rate": [trajectory.stop == "invalid"],
        "invalid_rate": [turn.parsed.action is None for turn in turns],
        "loop_rate": _repeats(turns),
        "random_rate": [turn.reply.source == "random" for turn in turns],
        "truncated_rate": [turn.reply.finish == "length" for turn in turns],
        "reply_tokens": [len(reply.token_ids) for reply in sampled],
        "repeated_token_rate": [repeated(reply.token_ids) for reply in sampled],
        "entropy": [reply.entropy for reply in sampled if reply.entropy is not None],
    }


def _repeats(turns: Sequence[Turn]) -> list[float]:
    """Which turns did in a state what had been done in that state before."""
    done: set[tuple[str, str | None]] = set()
    repeats: list[float] = []
    for turn in turns:
        deed = turn.observation.state_key, turn.parsed.action
        repeats.append(deed in done)
        done.add(deed)
    return repeats


def unknown(metrics: Mapping[str, float], prefix: str, suffix: str = "") -> int:
    """How many of the episodes in `metrics` are in no mean."""
    return round(sum(metrics.get(f"{prefix}/{name}{suffix}", 0.0) for name in COUNTED.values()))


def bonuses(trajectories: Iterable[Trajectory], prefix: str = "rollout") -> dict[str, float]:
    """`<prefix>/bonus/<name>`: the sum of each bonus over an episode, a mean over episodes."""
    sums: Counter[str] = Counter()
    episodes = [one for one in trajectories if one.known]
    for turn in (turn for one in episodes for turn in one.turns):
        sums.update(turn.bonuses)
    return {f"{prefix}/bonus/{name}": float(total / len(episodes)) for name, total in sorted(sums.items())}


def repeated(token_ids: Sequence[int]) -> float:
    """Share of a reply's runs of GRAM tokens that it had before."""
    runs = [tuple(token_ids[start : start + GRAM]) for start in range(len(token_ids) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class Tags:
    """Counts success by tag, but for GAME."""

    def __init__(self) -> None:
        # by tag, by value: successes and episodes
        self._counts: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)

    def count(self, trajectory: Trajectory) -> None:
        for tag, value in trajectory.tags.items():
            if tag == GAME:
                continue
            counts = self._counts[plain(tag)]
            if trajectory.known and len(counts) <= TAG_VALUES:
                count = counts.setdefault(plain(value), [0, 0])
                count[0] += trajectory.success
                count[1] += 1

    def figures(self, prefix: str = "eval") -> dict[str, float]:
        """`<prefix>/success/<tag>/<value>`, and under `<prefix>/episodes/` of how many episodes, for each tag that has
        TAG_VALUES values at most."""
        found: dict[str, float] = {}
        for tag, counts in self._counts.items():
            for value, (successes, episodes) in sorted(counts.items()) if len(counts) <= TAG_VALUES else ():
                found[f"{prefix}/success/{tag}/{value}"] = successes / episodes
                found[f"{prefix}/episodes/{tag}/{value}"] = float(episodes)
        return found


def by_tag(metrics: Mapping[str, float], variant: str = "") -> dict[str, dict[str, tuple[float, int]]]:
    """By tag, by value: the success of a panel in `metrics`, and over how many episodes."""
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, episodes in metrics.items():
        head, _, rest = name.partition("eval/episodes/")
        share = metrics.get(f"eval/success/{rest}{variant}")
        if not head and rest and "_" not in rest and share is not None:  # behind it stands a variant
            tag, _, value = rest.partition("/")
            found.setdefault(tag, {})[value] = share, int(episodes)
    return found


def plain(word: str) -> str:
    """A tag or its value as a part of a metric's name: what trackers take, and without the underscore before which
    `_greedy` and `_before` stand."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") or "none"
