"""A judge that fails at 30 % of its calls: `python benchmarks/failing_judge.py [--seeds 3] [--iterations 8]`.

The clone of benchmarks/visual_search.py is trained on the reward, once with a sound judge and once with one that hangs,
hangs up, answers 500 or babbles. It is asked about every answer (referee.rules=false). The judge compares texts; with
`--served PYTHON` it is a small model that `transformers serve` of that Python serves (`pip install
'transformers[serving]'`). Shown is the success of each iteration's rollout, a mean over seeds, and how many episodes
stayed unscored; and, of the episodes on record, how many were taken for wrong that the judge, asked again, calls right.
"""

import argparse
import json
import random
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for the server that answers as it is told
from chat_server import Answer, Server, text_of
from jobs import Job, play
from small_judge import asking, serving, teach
from visual_search import MODEL, OUT, job

from vlm_agents.episodes import read_episodes
from vlm_agents.referee import verdict_in

FAILING = 0.3
TIMEOUT_S = 10.0  # a hang lasts twice as long; the small model answers one request after the other


def same(request: dict) -> str:
    said = json.loads(text_of(request))
    return str(int(said["given answer"].strip().lower() == said["right answer"].strip().lower()))


class Faulty:
    """Fails at a share of the calls, each of four ways as often."""

    def __init__(self, judge: Callable[[dict], str]) -> None:
        self.judge = judge
        self.rng, self.lock, self.failed = random.Random(0), threading.Lock(), 0

    def __call__(self, request: dict) -> str | Answer:
        with self.lock:
            fails, way = self.rng.random() < FAILING, self.rng.randrange(4)
            self.failed += fails
        if not fails:
            return self.judge(request)
        if way == 0:
            threading.Event().wait(2 * TIMEOUT_S)
        return (self.judge(request), Answer(0), Answer(500, b"out of memory"), "Well, that depends.")[way]


def train(folder: str, seed: int, iterations: int, url: str) -> Job:
    words = (
        MODEL,
        f"seed={seed}",
        f"stage.init={OUT / 'clone/sft'}",
        "stage.eval_episodes=0",
        f"stage.iterations={iterations}",
        "referee=server",
        "referee.rules=false",
        f"referee.remote.url={url}",
        f"referee.remote.timeout_s={TIMEOUT_S}",
        f"referee.remote.cache={OUT / folder}.answers",
    )
    return job(folder, "ppo", *words)


def curve(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--served", metavar="PYTHON", help="the judge is a model, served by this Python's transformers")
    asked = parser.parse_args()
    served = serving(asked.served, teach(OUT / "judge")) if asked.served else nullcontext(same)
    with served as judge:
        compare(judge, "judged/served" if asked.served else "judged", asked.seeds, asked.iterations)


def compare(judge: Callable[[dict], str], place: str, seeds: int, iterations: int) -> None:
    faulty, runs = Faulty(judge), dict[str, list[Path]]()
    for kind, answer in (("sound", judge), ("faulty", faulty)):
        server = Server()
        server.answer = answer
        jobs = [train(f"{place}/{kind}/{seed}", seed, iterations, server.url) for seed in range(seeds)]
        for one in jobs:
            play(one)
        server.close()
        runs[kind] = [one.folder for one in jobs]
        print(f"{kind}: {len(server.requests)} calls" + (f", {faulty.failed} of them failed" * (kind == "faulty")))
    print("\n| iteration | sound judge | faulty judge | unscored |\n|---|---|---|---|")
    curves = {kind: np.array([curve(one, "rollout/success") for one in folders]) for kind, folders in runs.items()}
    lost = np.array([curve(one, "rollout/unscored") for one in runs["faulty"]])
    for step in range(iterations):
        means = (f"{curves[kind][:, step].mean():.3f} ± {curves[kind][:, step].std(ddof=1):.3f}" for kind in runs)
        print(f"| {step + 1} | {' | '.join(means)} | {lost[:, step].mean():.1f} |")
    for kind, folders in runs.items():
        recorded = [one for folder in folders for one in read_episodes(folder, pictures=False) if one.known]
        claims = [(one.success, one.turns[-1].step.claim) for one in recorded]
        judged = [
            (success, verdict_in(judge(asking(claim))), verdict_in(same(asking(claim))))
            for success, claim in claims
            if claim is not None
        ]
        wrong = sum(again is True and not success for success, again, _ in judged)
        mistaken = sum(again != exact for _, again, exact in judged)
        print(
            f"{kind}: of {len(judged)} recorded answers {wrong} were taken for wrong that the judge calls right; "
            f"{mistaken} are judged otherwise than by comparing texts"
        )


if __name__ == "__main__":
    main()
