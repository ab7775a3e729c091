"""What a run reads from outside, known by content: a path says nothing of what lies there now. Knows files, no formats.

Left out are the pictures of files in LLaVA's layout, and models in the hub's cache.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm_agents.config import RunConfig, SftConfig
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.weights import has_model, inside

INPUTS = "inputs.json"
OURS = ("heads", "temporal")  # what a model's folder may have inside; others, such as a Trainer's, are no part of it
PIECE = 1 << 16
PIECES = 1024  # of a file that are read: all of one up to 64 MiB, and of a larger one as many, spread evenly


def inputs_of(cfg: RunConfig) -> Iterator[Path]:
    """The files that are there: data, and the weights that play or learn, should any."""
    stage = cfg.stage
    sources = [stage.data] if isinstance(stage, SftConfig) else getattr(stage, "data", [])
    for source in map(Path, sources):
        yield from [source] if source.is_file() else [*sorted(source.glob("*.parquet")), source / "episodes.jsonl"]
    if not has_model(cfg):
        return
    for model in (getattr(stage, "init", None), cfg.model.path):
        if model:
            folder = inside(model)
            parts = (path for part in (folder, *map(folder.joinpath, OURS)) for path in sorted(part.glob("*")))
            yield from (path for path in parts if path.suffix != ".md" and path.name[0] != ".")


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """A hash of the content of each path that is a file."""
    found = {}
    for path in paths:
        try:
            if path.is_file():
                found[str(path)] = content_hash(path)
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror}. Mend that, or name another one") from error
    return found


def content_hash(path: Path) -> str:
    """BLAKE2b of a file's size and content, or of 64 MiB of it."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    last = max(0, (size - 1) // PIECE)  # index of the last piece
    indices = range(last + 1) if last < PIECES else [last * index // (PIECES - 1) for index in range(PIECES)]
    with open(path, "rb") as file:
        for index in indices:
            file.seek(index * PIECE)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def refuse_other_inputs(run_dir: Path) -> None:
    """ConfigError naming the first file that isn't what the run at `run_dir` read. One that is gone is no matter: what
    a run still needs of it is in its checkpoint, or missed by whoever reads it."""
    try:
        recorded = dict(json.loads((run_dir / INPUTS).read_text(encoding="utf-8")))
    except FileNotFoundError:  # of an older version
        return
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{run_dir / INPUTS} is unreadable: delete {run_dir}, or choose another name=") from error
    now = hashes(map(Path, recorded))
    for path, known in recorded.items():
        if now.get(path, known) != known:
            raise ConfigError(
                f"{run_dir} holds a run that read another {path}: put that back to continue it, or delete {run_dir} to "
                "run it anew"
            )
