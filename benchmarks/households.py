"""A tiny model in ALFWorld's households: `python benchmarks/households.py [--only clone|train|eval]`.

By text, and by the schematic picture in its place: episodes of the searcher, who knows what it has seen; the packaged
weights with a tokenizer that knows such chats; a clone of them, which then plays itself and is corrected (DAgger);
three seeds of GiGPO; and held-out layouts before and after, by kind of task. The models of pictures play with blank
ones too: the commands that are listed tell much by themselves. At the end success is told apart for held-out games of
which some training game had the same task, receptacles and places of what the task is about, whatever else lay around.

What is there is not run again, so the command goes on where it was stopped.
"""

from itertools import product
from pathlib import Path

from jobs import Job, make_tiny, play_parts

from vlm_agents.envs.alfworld.generator import generate
from vlm_agents.envs.alfworld.goals import HEAT, SIMPLE
from vlm_agents.episodes import read_episodes
from vlm_agents.metrics import wilson_interval
from vlm_agents.outcomes import read_outcomes
from vlm_agents.seeds import training_seed

OUT = Path("outputs/alfworld")
VIEWS, SEEDS, PLAYED, PANEL = ("text", "image"), (0, 1, 2), 800, 300
ITERATIONS, STARTS = 24, 16  # of GiGPO, and households of each iteration


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
        sizes = f"stage.iterations={ITERATIONS}", f"stage.episodes={8 * STARTS}", "stage.eval_episodes=0"
        return model(view), f"seed={seed}", f"stage.init={corrected(view).folder}", *sizes

    return [job(f"trained/{seed}", "ppo", view, *words(view, seed)) for view, seed in product(VIEWS, SEEDS)]


def evaluated() -> list[Job]:
    weights = {"clone": "sft", "corrected": "corrected", **{str(seed): f"trained/{seed}" for seed in SEEDS}}
    jobs = []
    for view, (name, folder) in product(VIEWS, weights.items()):
        words = model(view), f"stage.episodes={PANEL}", f"stage.init={OUT / view / folder}"
        jobs.append(job(f"eval/{name}", "eval", view, *words))
        if view == "image":
            jobs.append(job(f"eval/{name}_blank", "eval", view, *words, "env.observation=blank"))
    return jobs


def situation(seed: int) -> tuple[object, ...]:
    """A game's task, its receptacles, and where the things are that the task is about."""
    game = generate("tiny", (SIMPLE, HEAT), seed)
    facts = game.rules.init
    about = {name for predicate, name, *kind in facts if kind == [f"{game.named('object_target')}type"]}
    receptacles = sorted(fact[1] for fact in facts if fact[0] == "receptacletype")
    places = sorted(fact[2] for fact in facts if fact[0] == "inreceptacle" and fact[1] in about)
    return game.kind, game.named("object_target"), game.named("parent_target"), *receptacles, *places


def tell_seen(view: str) -> None:
    """Success where such a situation was trained on, and where none was."""
    played = (OUT / view / name for name in ("collect", "played"))
    seeds = {one.seed for folder in played for one in read_episodes(folder, pictures=False)}
    seeds |= {training_seed(*at) for at in product(SEEDS, range(ITERATIONS), range(STARTS))}
    known = {situation(seed) for seed in seeds}
    for folder in sorted((OUT / view / "eval").iterdir()):
        if not (folder / "DONE").exists():
            continue
        found = read_outcomes(folder, trained=False)
        for name, wanted in (("seen", True), ("new", False)):
            won = [one.success for one in found if (situation(one.seed) in known) == wanted]
            low, high = wilson_interval(sum(won), len(won))
            print(f"{folder}: {name}, {len(won)} games: {sum(won) / len(won):.3f} [{low:.3f}, {high:.3f}]")


def make_tinies() -> None:
    for view in VIEWS:
        make_tiny(OUT / view / "tiny", chats(view))


def main() -> None:
    play_parts(__doc__, {"clone": cloned, "train": trained, "eval": evaluated}, make_tinies)
    for view in VIEWS:
        tell_seen(view)


if __name__ == "__main__":
    main()
