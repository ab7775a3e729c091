"""The algorithms side by side: `python benchmarks/algorithms.py [--jobs 2] [--only PART]`.

Every conf/algo on four games, from the weights that ship with the package, until the same number of env steps.

* search: each algorithm at three learning rates on two of the games, fewer steps, with a run seed that no final run
  has. No held-out seed is played; an algorithm's rate is the one whose last rollouts succeeded most often over both.
* beyond: where the best of them is the lowest or the highest, one beyond it too. Prints the table.
* final: at that rate, three seeds, and the held-out panel before and after. `python -m vlm_agents.compare
  outputs/algorithms/final` makes the tables and the picture.
* controls: PPO that plays as few starts as algorithms with groups do, on the games that the search was on.
* thoughts: PPO by turn at several weights of the thought, and without one, on two games.

A run that is there is not run again, so the command goes on where it was stopped. One core a job.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from jobs import Job, play_parts

from vlm_agents.config import groups
from vlm_agents.tables import table

OUT = Path("outputs/algorithms")
# What is asked beyond what the shipped weights were taught leaves something to learn.
GAMES = {
    "number_line": ("env=number_line", "env.highest=9", "env.max_steps=9"),
    "ezpoints": ("env=ezpoints", "env.faces=rank"),
    "points24": ("env=points24", "env.solvable_only=true"),
    "doorkey": ("env=minigrid", "env.max_steps=24", "stage.episodes=16"),  # twice what the expert needs
}
RATES = (3e-5, 1e-4, 3e-4)
BEYOND = {3e-5: 1e-5, 3e-4: 1e-3}
SEARCHED = ("number_line", "ezpoints")  # in so few steps the others tell rates apart least
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
STEPS = {"number_line": 3000, "ezpoints": 3000, "points24": 3000, "doorkey": 4000}  # turns played in training
SEARCH_STEPS = 2000
DEMONSTRATIONS = 300  # episodes of the expert for the clones that `thoughts` begins from
SHARED = (
    "stage=ppo",
    "tracking=jsonl",
    "hardware.threads=1",
    "stage.iterations=1000",  # more than there can be: env steps end a run
    "algo.min_lr_ratio=1",
    "algo.minibatch_turns=32",  # few env steps: many optimizer steps
    "stage.episodes=32",
    "stage.checkpoint_every=10",
    "stage.keep_checkpoints=1",
)
PANEL = "stage.eval_episodes=100"  # held-out episodes, sampled and greedy, before and after
THOUGHT_STEPS = 2000
THOUGHTS = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1)
# Turns don't share a row here: a reply is the sequence that the ratio is of. The published range, 3e-4 and 4e-4, is of
# replies of thousands of tokens; a mean of some 30, as here, varies about ten times as much.
CHANGES = {"gspo": ("algo.ratio=turn", "algo.clip=3e-3", "algo.clip_high=4e-3")}


def training(folder: Path, game: str, algo: str, rate: float, seed: int, steps: int, *words: str) -> Job:
    chosen = (f"algo={algo}", *CHANGES.get(algo, ()), f"algo.lr={rate:g}", f"seed={seed}")
    return Job(folder, (*SHARED, *GAMES[game], *chosen, f"stage.env_steps={steps}", *words))


def searches() -> Iterator[Job]:
    for game, algo, rate in product(SEARCHED, groups()["algo"], RATES):
        yield search(game, algo, rate)


def beyond() -> Iterator[Job]:
    for game, algo in product(SEARCHED, groups()["algo"]):
        for rate in set(rates_of(algo)) - set(RATES):
            yield search(game, algo, rate)


def search(game: str, algo: str, rate: float) -> Job:
    folder, words = OUT / f"search/{game}/{algo}/{rate:g}", ("stage.init=null", "stage.eval_episodes=0")
    return training(folder, game, algo, rate, SEARCH_SEED, SEARCH_STEPS, *words)


def finals() -> Iterator[Job]:
    for seed, game, algo in product(SEEDS, GAMES, groups()["algo"]):  # a whole set of one seed first
        folder = OUT / f"final/{game}/{algo}/{seed}"
        yield training(folder, game, algo, best_rate(algo), seed, STEPS[game], "stage.init=null", PANEL)


def controls() -> Iterator[Job]:
    """PPO's credit knows no groups: what it loses by them is what few starts cost."""
    for seed, game in product(SEEDS, SEARCHED):
        folder, words = OUT / f"controls/{game}/ppo_in_groups/{seed}", ("algo.group_size=8", "stage.init=null", PANEL)
        yield training(folder, game, "ppo", best_rate("ppo"), seed, STEPS[game], *words)


def thoughts() -> Iterator[Job]:
    """All weights from one clone; without a thought from its own, of the same demonstrations."""
    for seed, game in product(SEEDS, ("number_line", "ezpoints")):
        rate = best_rate("ppo")
        for name, prompt, coef in [*((f"{coef:g}", "cot_json", coef) for coef in THOUGHTS), ("none", "action_only", 1)]:
            clone = cloned(game, prompt)
            words = (f"prompt={prompt}", f"algo.thought_coef={coef:g}", f"stage.init={clone.folder}", PANEL)
            job = training(OUT / f"thoughts/{game}/{name}/{seed}", game, "ppo", rate, seed, THOUGHT_STEPS, *words)
            yield job._replace(after=(clone,))


def cloned(game: str, prompt: str) -> Job:
    """The game as the shipped weights know it, taught in this format until it is learned: what `GAMES` asks beyond
    that is left to learn."""
    place = OUT / f"clones/{game}/{prompt}"
    shared = (GAMES[game][0], f"prompt={prompt}", "tracking=jsonl", "hardware.threads=1")
    collect = Job(place / "collect", ("stage=collect", *shared, f"stage.episodes={DEMONSTRATIONS}"))
    chats = Job(place / "preprocess", ("stage=preprocess", *shared, f"stage.data=[{collect.folder}]"), (collect,))
    words = (
        "stage=sft",
        *shared,
        f"stage.data={chats.folder}",
        "stage.batch_size=16",
        "stage.epochs=10",
        "stage.lr=3e-4",
    )
    return Job(place / "sft", words, (chats,))


def best_rate(algo: str) -> float:
    """The rate whose rollouts succeeded most often over the last quarter of the search, as a mean over its games:
    of one those are few starts, which differ in how hard they are. The lowest of equals."""
    return max(rates_of(algo), key=lambda rate: found(algo, rate))


def rates_of(algo: str) -> tuple[float, ...]:
    """Those that it is tried at, the lowest first."""
    best = max(RATES, key=lambda rate: found(algo, rate))
    return tuple(sorted({*RATES, BEYOND.get(best, best)}))


def found(algo: str, rate: float) -> float:
    """Success over the last quarter of its searches, a mean over games."""
    return float(np.mean([searched(OUT / f"search/{game}/{algo}/{rate:g}") for game in SEARCHED]))


def searched(folder: Path) -> float:
    success = [line["rollout/success"] for line in iterations(folder)]
    return float(np.mean(success[-max(3, len(success) // 4) :]))


def iterations(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run's iterations."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except OSError:
        sys.exit(f"{folder} isn't there: run what comes before first")
    return [line for line in lines if "rollout/success" in line]


def work() -> str:
    """What equal env steps came to in the finals, means over seeds, as a table: a run ends with an iteration."""
    rows = []
    for algo in groups()["algo"]:
        cells = []
        for game in GAMES:
            runs = [iterations(OUT / f"final/{game}/{algo}/{seed}") for seed in SEEDS]
            counted = [
                (run[-1]["rollout/env_steps"], len(run), sum(line["ppo/updates"] for line in run)) for run in runs
            ]
            cells.append(" / ".join(f"{mean:.0f}" for mean in np.mean(counted, axis=0)))
        rows.append([algo, *cells])
    return table(["env steps / iterations / updates", *GAMES], rows)


def rates() -> str:
    """What the search found, as a table."""
    rows, all_rates = [], sorted({*RATES, *BEYOND.values()})
    for algo in groups()["algo"]:
        told = {rate: f"{found(algo, rate):.3f}" for rate in rates_of(algo)}
        rows.append([algo, *(told.get(rate, "") for rate in all_rates), f"{best_rate(algo):g}"])
    return table(["algo", *(f"{rate:g}" for rate in all_rates), "taken"], rows)


def main() -> None:
    parts = {"search": searches, "beyond": beyond, "final": finals, "controls": controls, "thoughts": thoughts}
    played = play_parts(__doc__, parts)
    if "beyond" in played:
        print(rates())
    if "final" in played:
        print(work())


if __name__ == "__main__":
    main()
