"""Where each label stands: in each game beside the others, and over all games. Numbers alone; nothing here is written.

A label is what is compared, such as an algorithm; it has runs, which differ in their seeds. All runs of a game are held
against each other on the held-out seeds that all of them played to the end.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from vlm_agents.errors import ConfigError, DataError, did_you_mean
from vlm_agents.intervals import (
    Difference,
    Interval,
    difference,
    false_discoveries,
    improvement,
    iqm,
    of_these_runs,
    percentiles,
    ranks,
    resampled_panels,
    resampled_scores,
)
from vlm_agents.metrics import wilson_interval
from vlm_agents.outcomes import Outcome
from vlm_agents.sweeps import Played, name_of

WINDOW = 256  # training episodes that one point of a learning curve is the mean of, at least; of short runs see Game
SHARE = 0.9  # of the best label's success: what "steps to 90 %" reaches
ALPHA = 0.05
FEW = 3  # runs; of fewer, differences are found where there are none (docs/compare.md)


@dataclass
class Standing:
    """One label in one game. `outcomes` `[runs, seeds]`: was it solved; `replicates` `[replicates, runs]`: bootstrap
    scores of as many runs."""

    label: str
    runs: list[Played]
    outcomes: np.ndarray
    replicates: np.ndarray
    better: Interval | None = None  # probability that a run of it scores higher than one of the baseline
    gain: Difference | None = None  # over the baseline
    # means over runs, on the same seeds: greedy (success), return, positive_return, episode_length
    figures: dict[str, float] = field(default_factory=dict)
    # env steps to SHARE of the best, of each run; inf: never. Empty where nobody knows
    steps: list[float] = field(default_factory=list)
    beats: list[str] = field(default_factory=list)  # labels that are worse, and can be told apart from it

    @property
    def scores(self) -> np.ndarray:
        """Success of each run."""
        return self.outcomes.mean(axis=1)

    @property
    def success(self) -> Interval:
        return of_these_runs(self.outcomes)

    @property
    def iqm(self) -> Interval:
        return percentiles(float(iqm(self.scores)), iqm(self.replicates))

    @property
    def trimmed(self) -> bool:
        """Does the interquartile mean leave any run out? Else it is the mean, which success is already."""
        return len(self.runs) > 3

    @property
    def typical(self) -> Interval:
        """What the picture shows: the interquartile mean, or success."""
        return self.iqm if self.trimmed else self.success

    @property
    def seconds(self) -> float | None:
        """Median wall time of training."""
        times = [run.metrics["time/training"] for run in self.runs if run.metrics.get("time/training") is not None]
        return float(np.median(times)) if times else None


@dataclass
class Game:
    """One game's labels, in the order in which they were given."""

    name: str
    seeds: int
    standings: dict[str, Standing]
    before: float | None  # success before training, mean over the runs that know theirs
    greedy_before: float | None
    scripted: dict[str, Interval]  # success of random play and of the expert
    window: float  # training episodes of a point of all its curves: WINDOW, or half of the shortest run

    @property
    def target(self) -> float:
        return SHARE * max(standing.success.mean for standing in self.standings.values())


@dataclass
class Place:
    """One label over all games: its success, 0 as before training and 1 at best, and its rank by that."""

    label: str
    score: Interval
    rank: Interval
    runs: int


# ---- one game --------------------------------------------------------------------------------------------------------
def game(name: str, runs: Sequence[Played], baseline: str, rng: np.random.Generator) -> Game:
    """Hold the runs of one game against each other; DataError where no held-out seed was played by all of them."""
    seeds = common_seeds(name, runs)
    panels = resampled_panels(len(seeds), rng)
    standings = {}
    for label in dict.fromkeys(run.label for run in runs):
        own = sorted((run for run in runs if run.label == label), key=lambda run: run.seed)
        outcomes = np.array([[run.solved[seed] for seed in seeds] for run in own], dtype=float)
        replicates = resampled_scores(outcomes, panels, rng)
        standings[label] = Standing(label, own, outcomes, replicates, figures=figures(own, seeds))
    if baseline in standings:
        hold_against(standings[baseline], standings.values())
    tell_apart(standings)
    began, began_greedy = (success(seeds, [run.panel_before(variant) for run in runs]) for variant in ("", "_greedy"))
    window = min([WINDOW, *(trained_on(run) / 2 for run in runs if by_training(run) and trained_on(run))])
    one = Game(name, len(seeds), standings, began, began_greedy, scripted(runs, seeds), window)
    if all(map(watched, runs)) and one.target > (began or 0):
        for standing in standings.values():
            standing.steps = [steps_to(one.target, run) for run in standing.runs]
    return one


def hold_against(baseline: Standing, standings: Iterable[Standing]) -> None:
    for standing in standings:
        if standing is not baseline:
            chance = float(improvement(baseline.scores, standing.scores))
            standing.better = percentiles(chance, improvement(baseline.replicates, standing.replicates))
            standing.gain = difference(baseline.outcomes, standing.outcomes)


def tell_apart(standings: Mapping[str, Standing]) -> None:
    """Note for each label those that it beats, all pairs of the game being looked at."""
    pairs = list(combinations((own for own in standings.values() if len(own.runs) >= FEW), 2))
    chances = false_discoveries([difference(first.outcomes, second.outcomes).p for first, second in pairs])
    for (first, second), chance in zip(pairs, chances, strict=True):
        if chance < ALPHA:
            better, worse = sorted((first, second), key=lambda own: -own.success.mean)
            better.beats.append(worse.label)


def common_seeds(name: str, runs: Sequence[Played]) -> list[int]:
    """The held-out seeds that all runs played to the end; DataError, with whom to leave out, where there are none."""
    seeds = [set(run.solved) for run in runs]
    if found := set.intersection(*seeds):
        return sorted(found)
    others = (seeds[:at] + seeds[at + 1 :] for at in range(len(runs)))
    alone = next((run for run, rest in zip(runs, others, strict=True) if set.intersection(*rest)), None)
    whom = f"{alone.folder}, which shares none with the others" if alone else "runs that played others"
    raise DataError(f"{name}: no held-out seed was played to its end by all runs. Leave out {whom}")


def success(seeds: Sequence[int], panels: Iterable[Mapping[int, Outcome]]) -> float | None:
    """Mean over the panels that have all these seeds; None where there is none."""
    found = [np.mean([panel[seed].success for seed in seeds]) for panel in panels if panel.keys() >= set(seeds)]
    return float(np.mean(found)) if found else None


def figures(runs: Sequence[Played], seeds: Sequence[int]) -> dict[str, float]:
    """See Standing."""
    sampled = [panel[seed] for panel in (run.panel("") for run in runs) for seed in seeds]
    found = {
        "return": np.mean([one.total_reward for one in sampled]),
        "positive_return": np.mean([one.total_reward > 0 for one in sampled]),
        "episode_length": np.mean([one.turns for one in sampled]),
    }
    greedy = success(seeds, [run.panel("_greedy") for run in runs])
    return {name: float(value) for name, value in found.items()} | ({} if greedy is None else {"greedy": greedy})


def scripted(runs: Iterable[Played], seeds: Sequence[int]) -> dict[str, Interval]:
    """Success of random play and of the expert on these seeds, by the last run that played them."""
    found = {}
    for run in runs:
        for policy in ("random", "expert"):
            names = [f"eval/success{end}_{policy}" for end in ("", "_low", "_high")]
            played = run.scripted(policy)
            if played.keys() >= set(seeds):
                solved = sum(played[seed].success for seed in seeds)
                found[policy] = Interval(solved / len(seeds), *wilson_interval(solved, len(seeds)))
            elif set(run.solved) == set(seeds) and all(run.metrics.get(name) is not None for name in names):
                found[policy] = Interval(*(run.metrics[name] for name in names))  # of an evaluation
    return found


# ---- learning curves -------------------------------------------------------------------------------------------------
def trained_on(run: Played) -> int:
    """Training episodes."""
    return run.settings["stage.episodes"] * sum("rollout/success" in record for record in run.history.values())


def watched(run: Played) -> bool:
    """Was the panel played in between, not only before and after?"""
    return run.settings["stage.name"] == "ppo" and sum("eval/success" in record for record in run.history.values()) > 2


def by_training(run: Played) -> bool:
    """Is its curve of training episodes?"""
    grouped = run.settings.get("algo.group_size", 1) > 1
    return run.settings["stage.name"] == "ppo" and not grouped and not watched(run)


def curve(run: Played, window: float = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Env steps played in training, and success: on the panel where it was played in between, else of the training
    episodes, each point the mean over the last iterations that hold `window` of them. Empty for an evaluation, and
    where training plays groups: so few starts differ in how hard they are more than a policy changes."""
    total, at, panel, training = 0.0, [], [], []
    for record in run.history.values():
        if {"rollout/episode_length", "rollout/success"} <= record.keys():
            played = total + record["rollout/episode_length"] * run.settings["stage.episodes"]
            total = record.get("rollout/env_steps", played)
            at.append(total)
            training.append(record["rollout/success"])
        if "eval/success" in record:
            panel.append((total, record["eval/success"]))
    if watched(run):
        return np.array([step for step, _ in panel]), np.array([success for _, success in panel])
    if not by_training(run):
        return np.empty(0), np.empty(0)
    width = min(math.ceil(window / run.settings["stage.episodes"]), len(training))
    means = np.convolve(training, np.full(width, 1 / width), "valid") if width else np.empty(0)
    return np.array(at[max(0, width - 1) :]), means


def steps_to(target: float, run: Played) -> float:
    """Env steps until the run's curve reaches `target`; inf where it never does."""
    steps, success = curve(run)
    reached = np.flatnonzero(success >= target - 1e-9)
    return float(steps[reached[0]]) if len(reached) else math.inf


# ---- over all games --------------------------------------------------------------------------------------------------
def open_games(games: Sequence[Game]) -> list[Game]:
    """Those that weren't solved before training: the others tell nothing."""
    return [one for one in games if one.before is None or one.before < 1]


def ranking(games: Sequence[Game]) -> list[Place]:
    """The labels that played every game, the best first, by the mean over games of the interquartile mean over runs:
    over both at once it would leave out the games in which a label is best and worst. Each game's success counts from
    what it was before training (0 where nobody knows) to 1; a game that was solved before tells nothing."""
    games = open_games(games)
    labels = [label for label in (games[0].standings if games else ()) if all(label in one.standings for one in games)]
    if not labels:
        return []
    scores, replicates = [], []
    for label in labels:
        pooled = [(one.standings[label], one.before or 0.0) for one in games]
        scores.append(np.mean([(iqm(own.scores) - start) / (1 - start) for own, start in pooled]))
        replicates.append(np.mean([(iqm(own.replicates) - start) / (1 - start) for own, start in pooled], axis=0))
    drawn, places = np.stack(replicates, axis=1), ranks(np.round(scores, 9))  # equal but for rounding is equal
    drawn_ranks = ranks(np.round(drawn, 9))
    found = [
        Place(
            label,
            percentiles(scores[index], drawn[:, index]),
            percentiles(places[index], drawn_ranks[:, index]),
            min(len(one.standings[label].runs) for one in games),
        )
        for index, label in enumerate(labels)
    ]
    return sorted(found, key=lambda place: place.rank.mean)


def chosen_baseline(asked: str | None, runs: Sequence[Played]) -> str:
    """What the others are held against: the label asked for, else the first one."""
    labels = list(dict.fromkeys(run.label for run in runs))
    if asked is not None and asked not in labels:
        if name_of(asked) in labels:  # as it was given for folders
            return name_of(asked)
        raise ConfigError(f"--baseline {asked}: the labels are {', '.join(labels)}.{did_you_mean(asked, labels)}")
    return asked if asked is not None else labels[0]
