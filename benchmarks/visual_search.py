"""A tiny model learns to look closer by Python: `python benchmarks/visual_search.py [--only clone|train|eval]`.

* clone: episodes of the expert, and half as many of one that guesses without a look; the packaged weights with a
  tokenizer that knows such chats; and one clone of both, which looks now and then.
* train: the clone on the reward, three seeds, by algo=oversample_rank.
* eval: the clone and each of the trained on held-out scenes, with Python and, in equal time, without; beside them a
  clone that was taught to answer at once: what can be told from the reduced picture.

What is there is not run again, so the command goes on where it was stopped.
"""

from pathlib import Path

from jobs import Job, make_tiny, play_parts

OUT = Path("outputs/visual_search")
SEEDS = (0, 1, 2)
EPISODES, GUESSED, PANEL = 12000, 6000, 400  # of the expert; of one that guesses; held-out scenes
GUESSER = "env.expert=vlm_agents.experts.visual_search:Guesser"
BLIND = ("env.tool=false", "prompt=boxed")
MODEL = f"model.path={OUT / 'tiny'}"


def job(folder: str, stage: str, *words: str, after: tuple[Job, ...] = ()) -> Job:
    shared = (f"experiment=visual_search_tiny/{stage}", f"stage={stage}", "tracking=jsonl", "hardware.threads=1")
    return Job(OUT / folder, (*shared, *words), after)


def chats(name: str, *words: str) -> Job:
    """Those of the expert, and, where there is a tool to be used or not, those of one that guesses: right or wrong."""
    sources = [job(f"{name}/collect", "collect", f"stage.episodes={EPISODES}", *words)]
    if not words:
        guessed = (f"stage.episodes={GUESSED}", "seed=1", GUESSER)
        sources.append(job(f"{name}/guessed", "collect", *guessed))
    data = f"stage.data=[{','.join(str(source.folder) for source in sources)}]"
    return job(f"{name}/preprocess", "preprocess", data, *words, after=tuple(sources))


def clone(name: str, *words: str) -> Job:
    data = chats(name, *words)
    return job(f"{name}/sft", "sft", MODEL, f"stage.data={data.folder}", *words, after=(data,))


def trained() -> list[Job]:
    start = f"stage.init={OUT / 'clone/sft'}"
    return [job(f"trained/{seed}", "ppo", MODEL, f"seed={seed}", start, "stage.eval_episodes=0") for seed in SEEDS]


def evaluated() -> list[Job]:
    weights = {"clone": OUT / "clone/sft", **{str(one.folder.name): one.folder for one in trained()}}
    panel = (MODEL, f"stage.episodes={PANEL}")
    jobs = [job(f"eval/{name}", "eval", *panel, f"stage.init={folder}") for name, folder in weights.items()]
    blind = (*panel, f"stage.init={OUT / 'blind/sft'}", *BLIND)
    return [*jobs, job("eval/blind", "eval", *blind)]


def clones() -> list[Job]:
    return [clone("clone"), clone("blind", *BLIND)]


def main() -> None:
    parts = {"clone": clones, "train": trained, "eval": evaluated}
    play_parts(__doc__, parts, lambda: make_tiny(OUT / "tiny", chats("clone")))


if __name__ == "__main__":
    main()
