"""Credit per turn, in plain numpy: generalised advantage estimation and its yardsticks. Knows no model, no torch."""

from collections.abc import Sequence

import numpy as np


def gae(
    rewards: Sequence[float], values: Sequence[float], bootstrap: float, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [L] of one episode of L turns (Schulman et al. 2016, arXiv 1506.02438).

    `values[i]` is the critic's estimate before turn i. `bootstrap` is its estimate after the last turn if the episode
    was truncated there, and 0 if it terminated: a time-out is no failure.
    """
    advantages = np.zeros(len(rewards))
    following_advantage, following_value = 0.0, bootstrap
    for turn in reversed(range(len(rewards))):
        surprise = rewards[turn] + gamma * following_value - values[turn]
        advantages[turn] = following_advantage = surprise + gamma * lam * following_advantage
        following_value = values[turn]
    returns = advantages + np.asarray(values, dtype=np.float64)
    return advantages.astype(np.float32), returns.astype(np.float32)


def normalise(advantages: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1; only centred where nothing but rounding tells the turns apart."""
    centred = advantages.astype(np.float64) - advantages.mean(dtype=np.float64)
    spread = centred.std()
    return (centred / spread if spread > 1e-6 else centred).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Share of the returns' variance that the critic foresaw: 1 all of it, 0 none; 0 too where returns don't vary."""
    variance = returns.var(dtype=np.float64)
    return float(1 - (returns - values).var(dtype=np.float64) / variance) if variance > 0 else 0.0
