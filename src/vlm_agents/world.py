"""The ranks of a run: which of them this process is, and what they tell each other. One process is rank 0 of 1, and
then every call here returns at once.

Each rank takes every decision itself, from numbers that all ranks have: there is no leader, and no rank can wait for
another that went a different way. What is divided among them is work: episodes to play, rows to pass through the model.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # scripted stages need no torch
    from torch import Tensor

PATIENCE = timedelta(hours=2)  # for a rank that still plays; one that died is noticed at once
BUCKET_BYTES = 64 << 20  # of gradients that are sent at a time
Thing = TypeVar("Thing")


class PeerLost(BaseException):
    """Another rank is gone, or was waited for in vain: what went wrong is that one's to tell. No Exception: it may pass
    through who calls a user's code, and takes its errors for that code's."""


@dataclass(frozen=True)
class World:
    rank: int = 0
    ranks: int = 1

    @property
    def main(self) -> bool:
        """Is this the rank that writes files and speaks?"""
        return self.rank == 0

    def share(self, things: Sequence[Thing]) -> Sequence[Thing]:
        """Every so many-th of them: this rank's."""
        return things[self.rank :: self.ranks]

    def gather(self, thing: Thing) -> list[Thing]:
        """What each rank gave, in their order."""
        if self.ranks == 1:
            return [thing]
        import torch.distributed as dist

        found: list[Any] = [None] * self.ranks
        with telling_of_peers():
            dist.all_gather_object(found, thing)
        return found

    def any(self, flag: bool) -> bool:
        """Did any rank say yes?"""
        return any(self.gather(flag))

    def of_main(self, make: Callable[[], Thing]) -> Thing:
        """What `make` gives on rank 0, where alone it is called."""
        if self.ranks == 1:
            return make()
        import torch.distributed as dist

        found: list[Any] = [make() if self.main else None]
        with telling_of_peers():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(None)

    def add(self, tensors: Sequence["Tensor"]) -> None:
        """Replace each tensor by the sum over ranks. All on one device, and of the same shapes on all ranks."""
        if self.ranks == 1:
            return
        import torch.distributed as dist
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        for bucket in buckets(tensors):
            flat = _flatten_dense_tensors(bucket)
            with telling_of_peers():
                dist.all_reduce(flat)
            for tensor, its in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(its)


ALONE = World()  # of a run in one process


def buckets(tensors: Sequence["Tensor"]) -> Iterator[list["Tensor"]]:
    """As many of one type at a time as BUCKET_BYTES hold, one at least."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def telling_of_peers() -> Iterator[None]:
    """What torch raises where another rank is gone, as PeerLost."""
    from torch.distributed import DistBackendError, DistNetworkError

    try:
        yield
    except (DistBackendError, DistNetworkError) as error:
        raise PeerLost(str(error)) from error
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise PeerLost(str(error)) from error


def backend(device: str) -> str:
    """What carries tensors between ranks, as torch names it."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of a process that a launcher started as a rank."""
    import torch.distributed as dist

    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.init_process_group(backend(device), timeout=PATIENCE)
    yield world
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone
