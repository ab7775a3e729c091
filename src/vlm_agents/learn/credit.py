"""Credit: how much better or worse than expected what came after a turn was. Plain numpy; knows no model, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_agents.errors import TrainingError
from vlm_agents.types import Trajectory


@dataclass(frozen=True, slots=True)
class Credit:
    """Of one episode of L turns, [L] each: what its turns are worth to the policy, and what a critic should expect."""

    advantages: np.ndarray
    returns: np.ndarray
    values: np.ndarray  # what the critic did expect


def gae_by_turn(episodes: Sequence[Trajectory], gamma: float, lam: float) -> list[Credit]:
    """Generalised advantage estimation over the turns of each episode. TrainingError where a reply has no value."""
    credit = []
    for episode in episodes:
        values = [turn.reply.value for turn in episode.turns if turn.reply.value is not None]
        if len(values) < len(episode.turns):
            raise TrainingError(
                f"{episode.ident}: replies of policy {episode.policy} carry no value: "
                "this algorithm trains on what its own model sampled (policy=model)"
            )
        rewards = [turn.reward for turn in episode.turns]
        advantages, returns = gae(rewards, values, episode.bootstrap, gamma, lam)
        credit.append(Credit(advantages, returns, np.asarray(values, dtype=np.float32)))
    return credit


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


def normalised(credit: Sequence[Credit]) -> list[Credit]:
    """The same with advantages of mean 0 and standard deviation 1 over all turns."""
    advantages = normalise(np.concatenate([one.advantages for one in credit]))
    parts = np.split(advantages, np.cumsum([len(one.advantages) for one in credit])[:-1])
    return [replace(one, advantages=part) for one, part in zip(credit, parts, strict=True)]


def normalise(advantages: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1; only centred where nothing but rounding tells the turns apart."""
    centred = advantages.astype(np.float64) - advantages.mean(dtype=np.float64)
    spread = centred.std()
    return (centred / spread if spread > 1e-6 else centred).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Share of the returns' variance that the critic foresaw: 1 all of it, 0 none; 0 too where returns don't vary."""
    variance = returns.var(dtype=np.float64)
    return float(1 - (returns - values).var(dtype=np.float64) / variance) if variance > 0 else 0.0


def figures(credit: Sequence[Credit]) -> dict[str, float]:
    """What values and returns say, before any update. Raw advantages: normalised ones hide their size."""
    values, returns = (np.concatenate([getattr(one, name) for one in credit]) for name in ("values", "returns"))
    return {
        "ppo/explained_variance": explained_variance(values, returns),
        "ppo/advantage_std": float((returns - values).std()),
        "ppo/zero_advantage": float(np.isclose(returns, values, atol=1e-6).mean()),  # share of turns that teach nothing
    }
