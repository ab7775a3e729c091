"""The algorithms side by side: `python benchmarks/algorithms.py [--jobs 2] [--only search|final|thoughts]`.

Every conf/algo on four games, from the weights that ship with the package, until the same number of env steps.

* search: each algorithm and game at three learning rates, half the steps, with a run seed that no final run has. No
  held-out seed is played; the rate whose last rollouts succeeded most often is taken.
* final: at that rate, three seeds, and the held-out panel before and after. `python -m vlm_agents.compare
  outputs/algorithms/final` makes the tables and the picture.
* thoughts: PPO by turn at several weights of the thought, and without one, on two games.

A run that is there is not run again, so the command goes on where it was stopped. One core a job.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlm_agents.config import groups

OUT = Path("outputs/algorithms")
# What is asked beyond what the shipped weights were taught leaves something to learn.
GAMES = {
    "number_line": ("env=number_line", "env.highest=9", "env.max_steps=9"),
    "ezpoints": ("env=ezpoints", "env.faces=rank"),
    "points24": ("env=points24", "env.solvable_only=true"),
    "doorkey": ("env=minigrid",),
}
RATES = (3e-5, 1e-4, 3e-4)
SEARCHED, SEEDS = 100, (0, 1, 2)
STEPS = 6000  # turns played in training
SHARED = (
    "stage=ppo",
    "tracking=jsonl",
    "hardware.threads=1",
    "stage.init=null",
    "stage.iterations=1000",  # more than there can be: env steps end a run
    "algo.min_lr_ratio=1",
    "stage.checkpoint_every=10",
    "stage.keep_checkpoints=1",
)
THOUGHTS = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
# Turns don't share a row here: a reply is the sequence that the ratio is of.
CHANGES = {"gspo": ("algo.ratio=turn",)}


class Job(tuple[Path, tuple[str, ...]]):
    """A run directory, and the settings of the run in it."""


def searches() -> Iterator[Job]:
    for algo in groups()["algo"]:
        for game, settings in GAMES.items():
            for rate in RATES:
                words = (f"algo={algo}", *CHANGES.get(algo, ()), f"algo.lr={rate:g}", f"seed={SEARCHED}")
                yield Job(
                    (
                        OUT / f"search/{game}/{algo}/{rate:g}",
                        (*settings, *words, f"stage.env_steps={STEPS // 2}", "stage.eval_episodes=0"),
                    )
                )


def finals() -> Iterator[Job]:
    for seed in SEEDS:  # a whole set of one seed first
        for game, settings in GAMES.items():
            for algo in groups()["algo"]:
                words = (f"algo={algo}", *CHANGES.get(algo, ()), f"algo.lr={best_rate(game, algo):g}", f"seed={seed}")
                yield Job((OUT / f"final/{game}/{algo}/{seed}", (*settings, *words, f"stage.env_steps={STEPS}")))


def thoughts() -> Iterator[Job]:
    for seed in SEEDS:
        for game in ("number_line", "ezpoints"):
            for name, words in {
                **{f"{coef:g}": (f"algo.thought_coef={coef:g}",) for coef in THOUGHTS},
                "none": ("prompt=action_only",),
            }.items():
                rate = f"algo.lr={best_rate(game, 'ppo'):g}"
                yield Job(
                    (
                        OUT / f"thoughts/{game}/{name}/{seed}",
                        (*GAMES[game], *words, rate, f"seed={seed}", f"stage.env_steps={STEPS}"),
                    )
                )


def best_rate(game: str, algo: str) -> float:
    """The learning rate whose rollouts succeeded most often over the last quarter of the search."""
    return max(RATES, key=lambda rate: searched(OUT / f"search/{game}/{algo}/{rate:g}"))


def searched(folder: Path) -> float:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except OSError:
        sys.exit(f"{folder} isn't there: run --only search first")
    success = [line["rollout/success"] for line in lines if "rollout/success" in line]
    return float(np.mean(success[-max(1, len(success) // 4) :]))


def play(job: Job) -> None:
    folder, words = job
    if (folder / "DONE").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vlm_agents", *SHARED, *words, f"run_dir={folder}", f"name={folder.name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment)
    print(f"{folder}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parts = {"search": searches, "final": finals, "thoughts": thoughts}
    parser.add_argument("--only", choices=parts, help="that part alone")
    asked = parser.parse_args()
    for name in [asked.only] if asked.only else parts:
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(play, list(parts[name]())))


if __name__ == "__main__":
    main()
