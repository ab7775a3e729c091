"""What test_ranks.py runs: two ranks, of which one is forked from the other. Prints what rank 0 found, as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from vlm_agents import checkpoints, world
from vlm_agents.learn.batches import Shares


def find(its: world.World) -> dict[str, Any]:
    """The same on both ranks, but for what says which it is."""
    tensors = [torch.full((size,), its.rank + 1.0) for size in (3, 4, 1, 9, 2)]  # a bucket of 8 numbers, 9 alone, 2
    its.add(tensors)
    parts = [(1,) * length for length in (5, 3, 7, 1)]
    deal = Shares(8, its).deal(parts)
    # what is found of a part is its length, by which rank, and in which of its micro-batches
    found = [(len(part), its.rank, place) for place, cut in enumerate(deal.own) for part in cut]
    return {
        "gathered": its.gather(f"rank {its.rank}"),
        "any": [its.any(False), its.any(its.rank == 1)],
        "of rank 0": its.of_main(lambda: its.rank),
        "shared": its.share([0, 1, 2, 3, 4]),
        "added": [tensor.tolist() for tensor in tensors],
        "by part": deal.gathered(found),
        "checkpoint": saved(its, Path(sys.argv[2]) / str(its.rank)),
    }


def saved(its: world.World, folder: Path) -> dict[str, Any]:
    """What the checkpoint holds that both ranks write, of which each has a folder of its own."""
    path = checkpoints.save(
        folder, 3, lambda place: (place / str(its.rank)).touch(), {"state": {}, "seconds": 1, "offsets": {}}, 1, its
    )
    return {
        "at": str(path),
        "files": sorted(one.name for one in path.iterdir()),
        "whole": checkpoints.read(path) is not None,
    }


if __name__ == "__main__":
    world.BUCKET_BYTES = 8 * 4
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    child = os.fork()
    os.environ["RANK"] = "0" if child else "1"
    with world.joined("cpu") as joined:
        both = joined.gather(find(joined))
        if joined.main:
            print(json.dumps(both))
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
