"""A long run needs no more memory late than early."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

MIB = 2**20
WORDS = (
    "stage=ppo",
    "env=echo",
    "prompt.history=full",
    "prompt.max_reply_tokens=8",
    "stage.iterations=200",
    "stage.checkpoint_every=20",
    "stage.episodes=4",
    "stage.eval_episodes=0",
    "hardware.threads=1",
    "tracking=jsonl",
)


@pytest.mark.slow
def test_two_hundred_iterations_need_no_more_than_fifty(tmp_path: Path):
    """Resident bytes after each iteration. What kept the pictures of each, 4 x 3 of 56 x 56 x 3 bytes, would have
    16 MiB more after 150 more."""
    told = tmp_path / "run/metrics.jsonl"
    command = [sys.executable, "-m", "vlm_agents", *WORDS, f"run_dir={tmp_path / 'run'}"]
    seen: dict[int, int] = {}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
            iteration = told.read_bytes().count(b"\n") if told.exists() else 0
            seen[iteration] = max(seen.get(iteration, 0), pages * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(0.05)
    assert run.returncode == 0
    early, late = (max(its for at, its in seen.items() if first <= at < first + 25) for first in (25, 175))
    assert late - early < 8 * MIB, {at: round(its / MIB) for at, its in seen.items() if at % 25 == 0}
