"""How the samples of an iteration are cut: into mini-batches, one optimizer step each, and those over ranks and to fit
into memory."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np

from vlm_agents.world import ALONE, World

Part = TypeVar("Part", bound=Sized)
Found = TypeVar("Found")


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


@dataclass(frozen=True)
class Shares:
    """What a rank does of the passes over rows or samples: some of them, of about as many tokens as the others have,
    in micro-batches."""

    tokens_per_microbatch: int
    world: World = ALONE

    def own(self, parts: Sequence[Part]) -> list[list[Part]]:
        """This rank's micro-batches, longest first."""
        return self._cut(parts)[self.world.rank]

    def most(self, parts: Sequence[Part]) -> int:
        """The number of micro-batches of the rank that has most of them."""
        return max(map(len, self._cut(parts)))

    def gathered(self, parts: Sequence[Part], own: Sequence[Found]) -> list[Found]:
        """What was found of each part, in their order, where `own` are this rank's findings, in the order of its
        micro-batches."""
        owners = [list(chain.from_iterable(cut)) for cut in self._cut(parts)]
        found = {
            id(part): its
            for mine, theirs in zip(owners, self.world.gather(own), strict=True)
            for part, its in zip(mine, theirs, strict=True)
        }
        return [found[id(part)] for part in parts]

    def _cut(self, parts: Sequence[Part]) -> list[list[list[Part]]]:
        """The micro-batches of each rank: the longest part that is left goes to whoever has least so far."""
        if self.world.ranks == 1:
            return [microbatches(parts, self.tokens_per_microbatch)]
        shares: list[list[Part]] = [[] for _ in range(self.world.ranks)]
        load = [0] * self.world.ranks
        for part in sorted(parts, key=len, reverse=True):
            rank = load.index(min(load))
            shares[rank].append(part)
            load[rank] += len(part)
        return [microbatches(share, self.tokens_per_microbatch) for share in shares]
