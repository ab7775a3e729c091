"""Runs of the benchmarks: each in its folder, played once, after those that it needs."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vlm_agents.models.adapters import SHIPPED


class Job(NamedTuple):
    """A run directory, and the settings of the run in it; `after` are those that it takes something from."""

    folder: Path
    words: tuple[str, ...]
    after: tuple["Job", ...] = ()


def play(job: Job) -> None:
    """The run, unless it is there, and before it those that it needs."""
    if (job.folder / "DONE").exists():
        return
    for needed in job.after:
        play(needed)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vlm_agents", *job.words, f"run_dir={job.folder}", f"name={job.folder.name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (job.folder.parent / f"{job.folder.name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment)
    print(f"{job.folder}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def play_all(jobs: Sequence[Job], at_once: int) -> None:
    """So many at a time, one core each."""
    for needed in dict.fromkeys(one for job in jobs for one in job.after):  # several may need it: one after another
        play(needed)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(play, jobs))


def make_tiny(folder: Path, data: Job) -> None:
    """The packaged tiny model, its tokenizer's words those of the chats that `data` makes."""
    play(data)
    if not (folder / "config.json").exists():
        chats = data.folder / "train.parquet"
        command = [sys.executable, "-m", "vlm_agents.models.tiny", str(folder), str(chats), str(SHIPPED)]
        subprocess.run(command, check=True)


def play_parts(
    doc: str | None, parts: Mapping[str, Callable[[], Iterable[Job]]], before: Callable[[], None] = lambda: None
) -> list[str]:
    """The command line of a benchmark: all its parts in order, or `--only` one; `before` makes what they all need.
    Returns the parts that were played."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only", choices=parts, help="that part alone")
    asked = parser.parse_args()
    before()
    names = [asked.only] if asked.only else list(parts)
    for name in names:
        play_all(list(parts[name]()), asked.jobs)
    return names
