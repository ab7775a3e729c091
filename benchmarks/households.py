"""A tiny model in ALFWorld's households: `python benchmarks/households.py [--only clone|train|eval]`.

By text, and by the schematic picture in its place: the planner's episodes, the packaged weights with a tokenizer that
knows such chats, a clone of them, three seeds of PPO, and held-out layouts before and after, by kind of task.

What is there is not run again, so the command goes on where it was stopped.
"""

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

from jobs import Job, play, play_all

from vlm_agents.models.adapters import SHIPPED

OUT = Path("outputs/alfworld")
VIEWS, SEEDS, PANEL = ("text", "image"), (0, 1, 2), 300


def job(folder: str, stage: str, view: str, *words: str, after: tuple[Job, ...] = ()) -> Job:
    shared = (f"experiment=alfworld_tiny/{stage}", f"stage={stage}", f"env.observation={view}")
    return Job(OUT / view / folder, (*shared, "tracking=jsonl", "hardware.threads=1", *words), after)


def model(view: str) -> str:
    return f"model.path={OUT / view / 'tiny'}"


def chats(view: str) -> Job:
    collect = job("collect", "collect", view)
    return job("preprocess", "preprocess", view, f"stage.data=[{collect.folder}]", after=(collect,))


def make_tiny(view: str) -> None:
    """The packaged tiny model, its tokenizer's words those of the chats."""
    folder, data = OUT / view / "tiny", chats(view)
    play(data)
    if not (folder / "config.json").exists():
        path = data.folder / "train.parquet"
        subprocess.run(
            [sys.executable, "-m", "vlm_agents.models.tiny", str(folder), str(path), str(SHIPPED)], check=True
        )


def cloned() -> list[Job]:
    return [job("sft", "sft", view, model(view), f"stage.data={chats(view).folder}") for view in VIEWS]


def trained() -> list[Job]:
    """The seeds of one view after those of the other."""
    return [
        job(f"trained/{seed}", "ppo", view, model(view), f"seed={seed}", f"stage.init={OUT / view / 'sft'}")
        for view, seed in product(VIEWS, SEEDS)
    ]


def evaluated() -> list[Job]:
    return [
        job(f"eval/{name}", "eval", view, model(view), f"stage.episodes={PANEL}", f"stage.init={OUT / view / folder}")
        for view in VIEWS
        for name, folder in {"clone": "sft", **{str(seed): f"trained/{seed}" for seed in SEEDS}}.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parts = {"clone": cloned, "train": trained, "eval": evaluated}
    parser.add_argument("--only", choices=parts, help="that part alone")
    asked = parser.parse_args()
    for view in VIEWS:
        make_tiny(view)
    for name in [asked.only] if asked.only else parts:
        play_all(parts[name](), asked.jobs)


if __name__ == "__main__":
    main()
