"""A tiny model in ALFWorld's households: `python benchmarks/households.py [--only clone|train|eval]`.

By text, and by the schematic picture in its place: episodes of the searcher, who knows what it has seen; the packaged
weights with a tokenizer that knows such chats; a clone of them, which then plays itself and is corrected (DAgger);
three seeds of PPO; and held-out layouts before and after, by kind of task.

What is there is not run again, so the command goes on where it was stopped.
"""

from itertools import product
from pathlib import Path

from jobs import Job, make_tiny, play_parts

OUT = Path("outputs/alfworld")
VIEWS, SEEDS, PLAYED, PANEL = ("text", "image"), (0, 1, 2), 800, 300


def job(folder: str, stage: str, view: str, *words: str, after: tuple[Job, ...] = ()) -> Job:
    shared = (f"experiment=alfworld_tiny/{stage}", f"stage={stage}", f"env.observation={view}")
    return Job(OUT / view / folder, (*shared, "tracking=jsonl", "hardware.threads=1", *words), after)


def model(view: str) -> str:
    return f"model.path={OUT / view / 'tiny'}"


def chats(view: str) -> Job:
    collect = job("collect", "collect", view)
    return job("preprocess", "preprocess", view, f"stage.data=[{collect.folder}]", after=(collect,))


def clone(view: str) -> Job:
    return job("sft", "sft", view, model(view), f"stage.data={chats(view).folder}")


def corrected(view: str) -> Job:
    """The clone plays, the expert says what it should have done instead (DAgger), and the clone learns that too."""
    init = f"stage.init={clone(view).folder}"
    words = ("stage.policy=model", init, f"stage.episodes={PLAYED}", "stage.noise=0", "seed=1")
    played = job("played", "collect", view, model(view), *words, after=(clone(view),))
    sources = f"stage.data=[{chats(view).after[0].folder},{played.folder}]"
    words = (sources, "stage.label=advice", "stage.success_only=false")
    data = job("relabelled", "preprocess", view, *words, after=(played,))
    words = (f"stage.data={data.folder}", init, "stage.epochs=1", "stage.lr=5e-4")
    return job("corrected", "sft", view, model(view), *words, after=(data,))


def cloned() -> list[Job]:
    return [corrected(view) for view in VIEWS]


def trained() -> list[Job]:
    """The seeds of one view after those of the other. All begin from one clone, and are evaluated apart."""

    def words(view: str, seed: int) -> tuple[str, ...]:
        return model(view), f"seed={seed}", f"stage.init={corrected(view).folder}", "stage.eval_episodes=0"

    return [job(f"trained/{seed}", "ppo", view, *words(view, seed)) for view, seed in product(VIEWS, SEEDS)]


def evaluated() -> list[Job]:
    weights = {"clone": "sft", "corrected": "corrected", **{str(seed): f"trained/{seed}" for seed in SEEDS}}
    return [
        job(f"eval/{name}", "eval", view, model(view), f"stage.episodes={PANEL}", f"stage.init={OUT / view / folder}")
        for view, (name, folder) in product(VIEWS, weights.items())
    ]


def make_tinies() -> None:
    for view in VIEWS:
        make_tiny(OUT / view / "tiny", chats(view))


def main() -> None:
    play_parts(__doc__, {"clone": cloned, "train": trained, "eval": evaluated}, make_tinies)


if __name__ == "__main__":
    main()
