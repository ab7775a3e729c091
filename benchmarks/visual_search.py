"""A tiny model learns to look closer by Python: `python benchmarks/visual_search.py [--only clone|train|eval]`.

* clone: the expert's episodes, the packaged weights with a tokenizer that knows such chats, and one clone of them.
* train: the clone on the reward, three seeds, by algo=oversample_rank.
* eval: the clone and each of the trained on held-out scenes, with Python and, in equal time, without; beside them a
  clone that was taught to answer at once: what can be told from the reduced picture.

What is there is not run again, so the command goes on where it was stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from jobs import Job, play, play_all

from vlm_agents.models.adapters import SHIPPED

OUT = Path("outputs/visual_search")
SEEDS = (0, 1, 2)
EPISODES, PANEL = 12000, 400  # of the expert; held-out scenes
BLIND = ("env.tool=false", "prompt=boxed")
MODEL = f"model.path={OUT / 'tiny'}"


def job(folder: str, stage: str, *words: str, after: tuple[Job, ...] = ()) -> Job:
    shared = (f"experiment=visual_search_tiny/{stage}", f"stage={stage}", "tracking=jsonl", "hardware.threads=1")
    return Job(OUT / folder, (*shared, *words), after)


def chats(name: str, *words: str) -> Job:
    collect = job(f"{name}/collect", "collect", f"stage.episodes={EPISODES}", *words)
    return job(f"{name}/preprocess", "preprocess", f"stage.data=[{collect.folder}]", after=(collect,))


def clone(name: str, *words: str) -> Job:
    data = chats(name, *words)
    return job(f"{name}/sft", "sft", MODEL, f"stage.data={data.folder}", after=(data,))


def make_tiny() -> None:
    """The packaged tiny model, its tokenizer's words those of the chats of both clones."""
    folder, data = OUT / "tiny", chats("clone")
    play(data)
    if not (folder / "config.json").exists():
        path = data.folder / "train.parquet"
        subprocess.run(
            [sys.executable, "-m", "vlm_agents.models.tiny", str(folder), str(path), str(SHIPPED)], check=True
        )


def trained() -> list[Job]:
    start = f"stage.init={OUT / 'clone/sft'}"
    return [job(f"trained/{seed}", "ppo", MODEL, f"seed={seed}", start, "stage.eval_episodes=0") for seed in SEEDS]


def evaluated() -> list[Job]:
    weights = {"clone": OUT / "clone/sft", **{str(one.folder.name): one.folder for one in trained()}}
    panel = (MODEL, f"stage.episodes={PANEL}")
    jobs = [job(f"eval/{name}", "eval", *panel, f"stage.init={folder}") for name, folder in weights.items()]
    blind = (*panel, f"stage.init={OUT / 'blind/sft'}", *BLIND)
    return [*jobs, job("eval/blind", "eval", *blind)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parts = {
        "clone": lambda: [clone("clone"), clone("blind", *BLIND)],
        "train": trained,
        "eval": evaluated,
    }
    parser.add_argument("--only", choices=parts, help="that part alone")
    asked = parser.parse_args()
    make_tiny()
    for name in [asked.only] if asked.only else parts:
        play_all(parts[name](), asked.jobs)


if __name__ == "__main__":
    main()
