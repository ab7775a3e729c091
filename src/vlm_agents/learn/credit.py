"""Credit: how much better or worse than expected what came after a turn, or a token, was.

Plain numpy; knows no model, no torch. The estimators are functions of arrays; a rule applies one to episodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from vlm_agents.errors import TrainingError
from vlm_agents.learn.groups import TOLERANCE
from vlm_agents.ratings import quality
from vlm_agents.types import Trajectory

Reads = Literal["nothing", "turns", "tokens"]


@dataclass(frozen=True, slots=True)
class Credit:
    """Of one episode, [n] each: n is its number of turns, or of its reply tokens where a rule tells those apart."""

    advantages: np.ndarray
    returns: np.ndarray | None = None  # what a critic should expect
    values: np.ndarray | None = None  # what it did expect


class Rule(Protocol):
    """Credit for the episodes of an iteration.

    One that keeps something between iterations has `state_dict` and `load_state_dict` too, as torch's modules do: what
    a checkpoint then holds.
    """

    @property
    def reads(self) -> Reads:
        """Where it wants a critic's values: nowhere, before each turn, or before each reply token."""
        ...

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        """`values`: [n] of each episode, where the rule reads any. `done`: the share of training that lies behind."""
        ...


# ---- estimators ------------------------------------------------------------------------------------------------------
def gae(
    rewards: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    bootstrap: float,
    gamma: float | np.ndarray,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [L] of one episode of L turns (Schulman et al. 2016, arXiv 1506.02438).

    `values[i]` is the critic's estimate before turn i. `bootstrap` is its estimate after the last turn if the episode
    was truncated there, and 0 if it terminated: a time-out is no failure. `gamma` discounts what comes after a turn;
    [L] where turns differ in that.
    """
    rewards, values = (np.asarray(numbers, dtype=np.float64) for numbers in (rewards, values))
    gammas = np.broadcast_to(gamma, len(rewards))
    advantages = np.zeros(len(rewards))
    following_advantage, following_value = 0.0, bootstrap
    for turn in reversed(range(len(rewards))):
        surprise = rewards[turn] + gammas[turn] * following_value - values[turn]
        advantages[turn] = following_advantage = surprise + gammas[turn] * lam * following_advantage
        following_value = values[turn]
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def rewards_to_go(rewards: Sequence[float], gamma: float, bootstrap: float = 0.0) -> np.ndarray:
    """[L] discounted sum of the rewards from each turn on."""
    found, following = np.zeros(len(rewards)), bootstrap
    for turn in reversed(range(len(rewards))):
        found[turn] = following = rewards[turn] + gamma * following
    return found


def relative(scores: Sequence[float] | np.ndarray, std: bool) -> np.ndarray:
    """[n] each score minus their mean and, with `std`, over their standard deviation; 0 where none differs."""
    centred = np.asarray(scores, dtype=np.float64) - np.mean(scores)
    spread = centred.std()
    if spread <= TOLERANCE:
        return np.zeros(len(centred))
    return centred / spread if std else centred


def leave_one_out(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n] each score minus the mean of the others (RLOO, arXiv 2402.14740); 0 for one alone."""
    scores = np.asarray(scores, dtype=np.float64)
    n = len(scores)
    return relative(scores, std=False) * n / (n - 1) if n > 1 else np.zeros(n)


def normalise(advantages: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1; only centred where nothing but rounding tells the turns apart."""
    centred = advantages.astype(np.float64) - advantages.mean(dtype=np.float64)
    spread = centred.std()
    return (centred / spread if spread > 1e-6 else centred).astype(np.float32)


# ---- rules -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gae:
    """GAE over turns; with `lam` 1 what really came, minus the critic's value."""

    gamma: float
    lam: float
    reads: Reads = "turns"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        return [
            Credit(
                *gae(rewards_of(episode), its, episode.bootstrap, self.gamma, self.lam), values=its.astype(np.float32)
            )
            for episode, its in zip(episodes, values, strict=True)
        ]


@dataclass(frozen=True)
class TokenGae:
    """GAE over all reply tokens of an episode, one after another.

    A turn's reward comes with its last token, and `gamma` discounts what comes after that: for one-token turns this is
    GAE over turns.
    """

    gamma: float
    token_gamma: float
    token_lam: float
    reads: Reads = "tokens"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        credit = []
        for episode, its in zip(episodes, values, strict=True):
            rewards, gammas, last = np.zeros(len(its)), np.full(len(its), self.token_gamma), ends_of(episode)
            rewards[last], gammas[last] = rewards_of(episode), self.gamma
            credit.append(Credit(*gae(rewards, its, episode.bootstrap, gammas, self.token_lam), its))
        return credit


@dataclass(frozen=True)
class BilevelGae:
    """GAE over turns, then over the tokens within each (VAGEN, arXiv 2510.16907).

    A turn's return is paid with its last token, after which nothing comes, as VAGEN's code has it. That takes a turn's
    value before its last token; here it is before the first, as in GAE over turns, which this is for one-token turns.
    """

    gamma: float
    lam: float
    token_gamma: float
    token_lam: float
    reads: Reads = "tokens"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        credit = []
        for episode, its in zip(episodes, values, strict=True):
            turns = np.split(its, ends_of(episode)[:-1] + 1)
            first = [turn[0] for turn in turns]
            _, returns = gae(rewards_of(episode), first, episode.bootstrap, self.gamma, self.lam)
            parts = []
            for turn, worth in zip(turns, returns, strict=True):
                paid = np.zeros(len(turn))
                paid[-1] = worth
                parts.append(gae(paid, turn, 0.0, self.token_gamma, self.token_lam))
            advantages, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            credit.append(Credit(advantages, targets, its))
        return credit


@dataclass(frozen=True)
class Returns:
    """The discounted rewards from each turn on (REINFORCE). No critic: what a truncated episode lacks isn't guessed."""

    gamma: float
    reads: Reads = "nothing"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        return [Credit(rewards_to_go(rewards_of(one), self.gamma).astype(np.float32)) for one in episodes]


@dataclass(frozen=True)
class OfGroup:
    """An episode's discounted return beside those of its group, for each of its turns alike: by `leave_one_out`, or by
    `relative` (GRPO, arXiv 2402.03300, divides by the standard deviation; Dr. GRPO, arXiv 2503.20783, doesn't)."""

    gamma: float
    compare: Callable[[np.ndarray], np.ndarray]
    reads: Reads = "nothing"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        earned = np.array([rewards_to_go(rewards_of(episode), self.gamma)[0] for episode in episodes])
        advantages = compared(earned, [episode.seed for episode in episodes], self.compare)
        return [
            Credit(np.full(len(episode.turns), advantage, dtype=np.float32))
            for episode, advantage in zip(episodes, advantages, strict=True)
        ]


@dataclass(frozen=True)
class AnchorState:
    """GiGPO (arXiv 2505.10978): the episode's advantage within its group, plus `step_coef` times the step's among all
    steps of the group that were taken in the same state, by `state_key`. A state that was met once adds nothing.

    As in the paper episodes are compared by their whole return, and only steps by the discounted one.

    TrainingError where an env names no states.
    """

    gamma: float
    std: bool
    step_coef: float
    reads: Reads = "nothing"

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        def beside(scores: np.ndarray) -> np.ndarray:
            return relative(scores, self.std)

        whole = OfGroup(1.0, beside)(episodes, values, done)
        anchors = [(one.seed, turn.observation.state_key) for one in episodes for turn in one.turns]
        if not all(key for _, key in anchors):
            raise TrainingError(
                f"{episodes[0].env} names no states (state_key is empty), and algo.credit=gigpo compares the turns "
                "taken in one: choose another algo="
            )
        later = np.concatenate([rewards_to_go(rewards_of(one), self.gamma) for one in episodes])
        steps = np.split(compared(later, anchors, beside), np.cumsum([len(one.turns) for one in episodes])[:-1])
        return [
            Credit((one.advantages + self.step_coef * its).astype(np.float32))
            for one, its in zip(whole, steps, strict=True)
        ]


@dataclass(frozen=True)
class WithUtility:
    """Another rule's advantages, mixed over the first `share` of training with the return weighted by utility.

    Utility is a turn's rating, or how useful the expert finds it, from 0 to 1; the mix falls from all to nothing.
    """

    rule: Rule
    gamma: float
    share: float

    @property
    def reads(self) -> Reads:
        return self.rule.reads

    def __call__(self, episodes: Sequence[Trajectory], values: Sequence[np.ndarray], done: float) -> list[Credit]:
        mix = max(0.0, 1 - done / self.share)
        mixed = []
        for episode, credit in zip(episodes, self.rule(episodes, values, done), strict=True):
            rated = [quality(turn) if turn.rating is None else turn.rating for turn in episode.turns]
            ahead = 0.0 if self.reads == "nothing" else episode.bootstrap  # nobody trains what it is a guess of
            useful = np.array(rated) / 10 * rewards_to_go(rewards_of(episode), self.gamma, ahead)
            advantages = mix * spread(useful, episode, len(credit.advantages)) + (1 - mix) * credit.advantages
            mixed.append(replace(credit, advantages=advantages.astype(np.float32)))
        return mixed


# ---- from episodes, and over them ------------------------------------------------------------------------------------
def rewards_of(episode: Trajectory) -> list[float]:
    return [turn.reward for turn in episode.turns]


def lengths_of(episode: Trajectory) -> list[int]:
    """Tokens of each reply."""
    return [len(turn.reply.token_ids) for turn in episode.turns]


def ends_of(episode: Trajectory) -> np.ndarray:
    """[L] where the last token of each reply stands among all of the episode's."""
    return np.cumsum(lengths_of(episode)) - 1


def sampled_values(episodes: Sequence[Trajectory]) -> list[np.ndarray]:
    """[L] of each: the critic's values before its turns, as the sampler has them. TrainingError where it has none."""
    found = []
    for episode in episodes:
        values = [turn.reply.value for turn in episode.turns if turn.reply.value is not None]
        if len(values) < len(episode.turns):
            raise TrainingError(
                f"{episode.ident}: replies of policy {episode.policy} carry no value: "
                "this algorithm trains on what its own model sampled (policy=model)"
            )
        found.append(np.array(values))
    return found


def check(earned: Sequence[Credit], episodes: Sequence[Trajectory], reads: Reads) -> None:
    """TrainingError where what a rule gave isn't of every turn, or of every reply token, of these episodes."""
    if not isinstance(earned, Sequence) or not all(isinstance(its, Credit) for its in earned):
        kinds = {type(one).__name__ for one in earned} if isinstance(earned, Sequence) else {type(earned).__name__}
        raise TrainingError(f"the credit rule gives {', '.join(sorted(kinds))}: give a list of one Credit an episode")
    if len(earned) != len(episodes):
        raise TrainingError(f"the credit rule gives {len(earned)} credits for {len(episodes)} episodes: give one each")
    for episode, its in zip(episodes, earned, strict=True):
        due = {len(episode.turns), sum(lengths_of(episode))}
        if its.returns is None and reads != "nothing":
            raise TrainingError(
                f"the credit rule reads a critic's values, by {reads}, and gives no returns that a critic could learn: "
                "give Credit.returns, or have reads='nothing'"
            )
        for name, numbers in (("advantages", its.advantages), ("returns", its.returns)):
            if numbers is not None and not np.isfinite(numbers).all():
                raise TrainingError(f"the credit rule's {name} for {episode.ident} aren't all finite numbers")
            if numbers is not None and len(numbers) not in due:
                raise TrainingError(
                    f"the credit rule gives {len(numbers)} {name} for {episode.ident}, of {len(episode.turns)} turns "
                    f"and {sum(lengths_of(episode))} reply tokens: one is due for each of the ones or of the others"
                )


def spread(numbers: np.ndarray, episode: Trajectory, n: int) -> np.ndarray:
    """[n] where `numbers` are the turns' or already the tokens': each turn's for every token of its reply."""
    return numbers if len(numbers) == n else np.repeat(numbers, lengths_of(episode))


def compared(scores: np.ndarray, keys: Sequence[object], compare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[n] what `compare` makes of the scores that share a key."""
    places: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    found = np.zeros(len(scores))
    for its in places.values():
        found[its] = compare(scores[its])
    return found


def normalised(credit: Sequence[Credit]) -> list[Credit]:
    """The same with advantages of mean 0 and standard deviation 1 over all turns, or tokens."""
    advantages = normalise(np.concatenate([one.advantages for one in credit]))
    parts = np.split(advantages, np.cumsum([len(one.advantages) for one in credit])[:-1])
    return [replace(one, advantages=part) for one, part in zip(credit, parts, strict=True)]


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """Share of the returns' variance that the critic foresaw: 1 all of it, 0 none; 0 too where returns don't vary."""
    variance = returns.var(dtype=np.float64)
    return float(1 - (returns - values).var(dtype=np.float64) / variance) if variance > 0 else 0.0


def figures(credit: Sequence[Credit]) -> dict[str, float]:
    """What credit says, before any update: of advantages as they are before they are normalised, which hides their
    size."""
    found: dict[str, float] = {}
    with_critic = [(one.values, one.returns) for one in credit if one.values is not None and one.returns is not None]
    if with_critic:
        values, returns = (np.concatenate(arrays) for arrays in zip(*with_critic, strict=True))
        found["explained_variance"] = explained_variance(values, returns)
    advantages = np.concatenate([one.advantages for one in credit])
    return found | {
        "advantage_std": float(advantages.std()),
        "zero_advantage": float((np.abs(advantages) <= 1e-6).mean()),  # share of turns that teach nothing
    }
