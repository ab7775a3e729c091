"""How sure a comparison of runs can be: means, intervals, differences and ranks. Pure functions of arrays.

`outcomes` are `[runs, seeds]`, what came of each held-out seed in each run of one kind, such as 0 or 1 for success;
the score of a run is its mean. Interquartile mean, probability of improvement and the bootstrap stratified by kind and
game are those of Agarwal et al. 2021 (arXiv 2108.13264). Knows no run, no file and no name.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from vlm_agents.metrics import wilson_interval

REPLICATES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A difference of two means with its 95 % interval, and the p-value of there being none."""

    mean: float
    low: float
    high: float
    p: float


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: a quarter of the scores, rounded down, left out at each end. Of fewer than
    4 it is their mean."""
    return stats.trim_mean(scores, 0.25, axis=-1)


def resampled_panels(seeds: int, rng: np.random.Generator, replicates: int = REPLICATES) -> np.ndarray:
    """How often each held-out seed is drawn, as a share, `[replicates, seeds]`. One draw serves all runs of a game, for
    they played the same seeds: luck of the deal is then drawn for all of them alike."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds


def resampled_scores(outcomes: np.ndarray, panels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores of runs drawn with replacement, each on the drawn held-out seeds, `[replicates, runs]`."""
    scores = panels @ outcomes.T
    drawn = rng.integers(len(outcomes), size=scores.shape)
    return np.take_along_axis(scores, drawn, axis=1)


def percentiles(estimate: float, replicates: np.ndarray) -> Interval:
    """The estimate with the middle 95 % of its bootstrap replicates."""
    low, high = np.quantile(replicates, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(estimate), float(low), float(high))


def improvement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Probability that a run of the second kind scores higher than one of the first, over all pairs of `[..., runs]`; a
    tie is half (Mann and Whitney's U)."""
    pairs = second[..., :, None] - first[..., None, :]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean(axis=(-2, -1))


def of_these_runs(outcomes: np.ndarray) -> Interval:
    """Mean success with a 95 % interval over held-out seeds that the runs have in common, of these runs alone.

    It is Wilson's, of as many independent episodes as would spread that much: between one a seed, where luck is all in
    the deal and the runs do alike, and all that were played, where it is all in the sampling. (Kish's effective sample
    size, with a seed as cluster.)
    """
    runs, seeds = outcomes.shape
    shares = outcomes.mean(axis=0)
    mean, spread = float(shares.mean()), float(shares.var(ddof=1)) / seeds if seeds > 1 else 0.0
    episodes = min(max(mean * (1 - mean) / spread if spread > 0 else 0.0, seeds), runs * seeds)
    return Interval(mean, *wilson_interval(mean * episodes, episodes))


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Mean of the second kind minus the first, from -1 to 1, paired by held-out seed.

    Runs and seeds both vary, so both are clusters (two-way, Cameron, Gelbach and Miller 2011): the variance between
    runs, plus that of the differences between seeds, minus the noise of single episodes, which is in both. Student's t
    with Satterthwaite's degrees of freedom, so that few runs make it wide. Of a kind with one run nothing is known of
    the variance between runs: the interval is then of that run's weights alone.
    """
    seeds = first.shape[1]
    mean = float(second.mean() - first.mean())
    parts, noise = [], 0.0  # (variance, degrees of freedom)
    for outcomes in (first, second):
        runs = len(outcomes)
        if runs > 1:
            parts.append((float(outcomes.mean(axis=1).var(ddof=1)) / runs, runs - 1))
            rest = outcomes - outcomes.mean(axis=1, keepdims=True) - outcomes.mean(axis=0) + outcomes.mean()
            noise += float((rest**2).sum()) / ((runs - 1) * max(1, seeds - 1)) / (runs * seeds)
    between_runs = sum(variance for variance, _ in parts)
    if seeds > 1:
        parts.append((float((second.mean(axis=0) - first.mean(axis=0)).var(ddof=1)) / seeds, seeds - 1))
    largest = max((between_runs, parts[-1][0])) if parts else 0.0
    variance = max(sum(variance for variance, _ in parts) - noise, largest)
    if variance == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    spread = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    low, high = max(mean - spread, -1.0), min(mean + spread, 1.0)
    return Difference(mean, low, high, float(2 * stats.t.sf(abs(mean) / variance**0.5, freedom)))


def false_discoveries(values: Sequence[float]) -> list[float]:
    """p-values adjusted for being many (Benjamini and Hochberg 1995): of the differences whose adjusted value is below
    0.05, at most 5 % are expected to be none."""
    return stats.false_discovery_control(values).tolist() if len(values) else []


def ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks over the last axis, 1 for the highest score; equal scores share theirs."""
    return stats.rankdata(-scores, axis=-1)


def bands(curves: np.ndarray, rng: np.random.Generator, replicates: int = REPLICATES) -> np.ndarray:
    """Ends of the 95 % bootstrap interval of the mean over runs at each point of `[runs, points]`: `[2, points]`."""
    drawn = rng.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=replicates) / len(curves)
    return np.quantile(drawn @ curves, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
