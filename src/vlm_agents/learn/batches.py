"""How the samples of an iteration are cut: into mini-batches, one optimizer step each, and those to fit into memory."""

from collections.abc import Sequence, Sized
from typing import TypeVar

import numpy as np

Part = TypeVar("Part", bound=Sized)


def minibatches(lengths: Sequence[int], turns: int, rng: np.random.Generator) -> list[list[int]]:
    """Which samples go together: the shuffled indices of rows of these lengths, in turns, in mini-batches of about
    `turns` turns, as even as rows allow.

    Even, because a left-over of two turns would move the weights as far as a full mini-batch does.
    """
    order = rng.permutation(len(lengths))
    shuffled = np.asarray(lengths)[order]
    number = max(1, round(shuffled.sum() / turns))
    middles = shuffled.cumsum() - shuffled / 2  # a sample goes where the middle of its turns falls
    places = (middles * number / shuffled.sum()).astype(int)
    return [order[places == place].tolist() for place in np.unique(places)]


def microbatches(parts: Sequence[Part], max_tokens: int) -> list[list[Part]]:
    """Rows or samples by length, cut where padding would pass `max_tokens`; one that is larger than that goes alone.

    Longest first: where memory is too small, that shows at once.
    """
    cut: list[list[Part]] = []
    for part in sorted(parts, key=len, reverse=True):
        if cut and len(cut[-1][0]) * (len(cut[-1]) + 1) <= max_tokens:
            cut[-1].append(part)
        else:
            cut.append([part])
    return cut
