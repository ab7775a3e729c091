"""How the samples of an iteration are cut: into mini-batches, one optimizer step each, and those to fit into memory."""

from collections.abc import Sequence, Sized
from typing import TypeVar

import numpy as np

from vlm_agents.learn.samples import Sample

Part = TypeVar("Part", bound=Sized)


def minibatches(samples: Sequence[Sample], turns: int, rng: np.random.Generator) -> list[list[Sample]]:
    """Shuffled samples in mini-batches of about `turns` turns, as even as rows allow.

    Even, because a left-over of two turns would move the weights as far as a full mini-batch does.
    """
    shuffled = [samples[index] for index in rng.permutation(len(samples))]
    lengths = np.array([len(sample.row.spans) for sample in shuffled])
    number = max(1, round(lengths.sum() / turns))
    middles = lengths.cumsum() - lengths / 2  # a sample goes where the middle of its turns falls
    places = (middles * number / lengths.sum()).astype(int)
    return [[one for one, at in zip(shuffled, places, strict=True) if at == place] for place in np.unique(places)]


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
