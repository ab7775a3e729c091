"""Which episode is which: the seeds of training and of held-out panels, and the deal that an episode begins from.

Numbers alone: no env, no policy and no run is known here.
"""

import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

logger = logging.getLogger(__name__)

TRAINING_SEEDS = 2**30  # training seeds lie below, held-out panels at or above it: disjoint by construction


class Deal(NamedTuple):
    """What decides an episode but for who plays it: `seed` its start, `member` which of the plays of that start it is.

    The members of one seed are a group: different plays of the same start.
    """

    seed: int
    member: int = 0


def stable_hash(*words: object) -> int:
    """64 bits that depend on the words alone, not on the process."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest(), "big")


def training_seed(run_seed: int, iteration: int, episode: int) -> int:
    """Seed of a training episode, in [0, 2^30)."""
    return stable_hash("training", run_seed, iteration, episode) % TRAINING_SEEDS


def panel_seeds(env_id: str, n: int) -> list[int]:
    """The first `n` held-out seeds of an env, in [2^30, 2^31): the same for every run seed, model and policy."""
    return [TRAINING_SEEDS + stable_hash("panel", env_id, index) % TRAINING_SEEDS for index in range(n)]


def held_out(seed: int) -> bool:
    """Is it kept for panels, and never trained on?"""
    return seed >= TRAINING_SEEDS


def row(seed: int, env_id: str, count: int) -> int:
    """Which of an env's `count` rows (questions, games of files) a seed stands for.

    Of rows that are held out, the first panel seeds are all in their order: a panel of as many asks each once, and a
    larger one is told that it repeats some.
    """
    if held_out(seed):
        if (place := _places(env_id, count).get(seed)) is not None:
            return place
        _tell_repeats(count)
    return stable_hash("row", seed) % count


@cache
def _places(env_id: str, count: int) -> Mapping[int, int]:
    return {seed: place for place, seed in enumerate(panel_seeds(env_id, count))}


@cache
def _tell_repeats(count: int) -> None:
    logger.warning(
        "a panel of more episodes than the %d that are held out plays some again, and its interval is too narrow: "
        "stage.episodes=%d (stage.eval_episodes in training) plays each once",
        count,
        count,
    )
