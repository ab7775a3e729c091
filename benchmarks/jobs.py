"""Runs of the benchmarks: each in its folder, played once, after those that it needs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


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
