"""Checkpoints on disk: folders `step_000012` that are either whole or passed over. Knows nothing of what is in them.

Each holds what its writer wrote and a state.json with the state, and the checksum of every file.
"""

import json
import logging
import math
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlm_agents.errors import DataError
from vlm_agents.files import sync, temporary_of, writing
from vlm_agents.world import ALONE, World

log = logging.getLogger(__name__)

STATE = "state.json"
NAME = re.compile(r"step_(\d+)")
# How torch's and safetensors' own writers tell that a file can't be written, where Python has an OSError.
FULL_DISK = re.compile(r"inline_container|PytorchStreamWriter|iostream error|I/O error")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint. `state` is its stage's, `seconds` what the run had taken, `offsets` how long its append-only
    files were, `last_lines` the marks of their last lines, `keep` how many checkpoints were wanted, `best` the step of
    another one; older versions wrote none of these three."""

    step: int
    path: Path
    state: Mapping[str, Any]
    seconds: float
    offsets: Mapping[str, int]
    last_lines: Mapping[str, Sequence[str]]
    keep: int | None
    best: int | None

    def told(self, unit: str, total: int) -> str:
        """Where a run goes on that continues from here, for a person."""
        return f"continues after {unit} {self.step} of {total}, from {self.path.parent.name}/{self.path.name}"


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    record: Mapping[str, Any],
    keep: int,
    world: World = ALONE,
) -> Path:
    """Have `write` fill a new checkpoint, and keep the newest `keep` and the one of the record's `best` step. A crash
    leaves those that were there before.

    All ranks write files for it, side by side; it counts once all of them have.
    """
    final = world.of_main(lambda: place_of(folder, step))
    with writing(final):
        own = temporary_of(final.with_name(f"{final.name}.{world.rank}"))  # nodes may have processes of one number
        filled(own, write)
        checksums = {str(path.relative_to(own)): checksum(path) for path in files_in(own)}
        parts = world.gather((own, checksums))
        if world.main:
            for part, files in parts[1:]:
                for name in files:
                    (part / name).rename(own / name)
                shutil.rmtree(part)
            files = {name: value for _, its in parts for name, value in its.items()}
            (own / STATE).write_text(json.dumps({"step": step, "keep": keep, **record, "files": files}))
            sync(own / STATE)
            put(own, final)
            for later in newest_first(folder):
                if step_of(later) > step:  # it is damaged: we went back
                    remove(later)
            prune(folder, step, keep, record.get("best"))
    world.wait()
    return final


def prune(folder: Path, step: int, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints of those up to `step`, and the one of step `best`."""
    for old in [path for path in newest_first(folder) if step_of(path) <= step][keep:]:
        if step_of(old) != best:
            remove(old)


def remove(folder: Path) -> None:
    """In one step, as far as readers see."""
    away = temporary_of(folder)
    folder.rename(away)
    shutil.rmtree(away)


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that replaces `final` once it is whole and on the disk."""
    temporary = temporary_of(final)
    with writing(final):
        filled(temporary, write)
        put(temporary, final)


def filled(temporary: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder, and what it writes reach the disk. OSError where that can't be."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except (RuntimeError, SafetensorError) as error:
        if not FULL_DISK.search(str(error)):
            raise
        raise OSError(str(error)) from error
    for path in files_in(temporary):
        sync(path)


def put(temporary: Path, final: Path) -> None:
    """In the place of `final`, which a run may have left that went back to an older checkpoint."""
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)


def latest(folder: Path, before: float = math.inf) -> Checkpoint | None:
    """The newest whole checkpoint from before that step; None if there never was one, DataError if all of them are
    damaged."""
    candidates = [path for path in newest_first(folder) if step_of(path) < before]
    for candidate in candidates:
        checkpoint = read(candidate)
        if checkpoint is not None:
            return checkpoint
        log.warning("checkpoint %s is damaged: going on from the one before it", candidate)
    if candidates:
        raise DataError(f"every checkpoint under {folder} is damaged: delete {folder.parent} and start anew")
    return None


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None unless its files are all there and as they were written."""
    try:
        record = json.loads((folder / STATE).read_text())
        whole = all(checksum(folder / name) == crc for name, crc in record["files"].items())
        checkpoint = Checkpoint(
            record["step"],
            folder,
            record["state"],
            record["seconds"],
            record["offsets"],
            record.get("last_lines", {}),
            record.get("keep"),
            record.get("best"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return checkpoint if whole else None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not; what has another name is somebody else's."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def place_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksum(path: Path) -> int:
    """CRC-32 of a file, read piece by piece."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
