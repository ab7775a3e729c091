"""How the samples of an iteration are cut: into mini-batches, one optimizer step each, and those over ranks and to fit
into memory."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

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
    """How passes over rows or samples are divided: each rank has about as many tokens, in micro-batches."""

    tokens_per_microbatch: int
    world: World = ALONE

    def deal(self, parts: Sequence[Part]) -> "Deal[Part]":
        """The longest part that is left goes to whoever has least so far."""
        shares: list[list[Part]] = [[] for _ in range(self.world.ranks)]
        load = [0] * self.world.ranks
        for part in sorted(parts, key=len, reverse=True):
            rank = load.index(min(load))
            shares[rank].append(part)
            load[rank] += len(part)
        return Deal(parts, [microbatches(share, self.tokens_per_microbatch) for share in shares], self.world)


@dataclass(frozen=True)
class Deal(Generic[Part]):
    """Rows or samples as they were dealt: `cuts` are the micro-batches of each rank, longest first."""

    parts: Sequence[Part]
    cuts: Sequence[list[list[Part]]]
    world: World

    @property
    def own(self) -> list[list[Part]]:
        """This rank's micro-batches."""
        return self.cuts[self.world.rank]

    @property
    def missing(self) -> int:
        """How many micro-batches fewer this rank has than the one that has most."""
        return max(map(len, self.cuts)) - len(self.own)

    def gathered(self, own: Sequence[Found]) -> list[Found]:
        """What was found of each part, in their order, where `own` are this rank's findings, in the order of its
        micro-batches."""
        found = {
            id(part): its
            for cut, theirs in zip(self.cuts, self.world.gather(own), strict=True)
            for part, its in zip(chain.from_iterable(cut), theirs, strict=True)
        }
        return [found[id(part)] for part in self.parts]
