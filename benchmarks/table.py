"""A table of finished evaluations: `python benchmarks/table.py base=outputs/x/eval after_ppo=outputs/y/eval`.

One line a name, sampled and greedy. Runs that differ in their seed are pooled, `after_ppo=runs/y,runs/z`:
their means, the interval over all their episodes, which says nothing of how far another seed may fall, and the success
of each. The random and expert baselines are those of the last run that played them. Below, each name is compared with
the one before it, episode by episode of the same held-out seed: much of what tells two policies' rates apart is luck of
the deal, which both share.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml

from vlm_agents.episodes import read_episodes
from vlm_agents.stages.playing import wilson_interval

COLUMNS = ("success", "positive_return", "return", "episode_length")


def read(folder: Path) -> tuple[dict[str, float], int]:
    """The metrics of an evaluation, and how many episodes it played."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return json.loads((folder / "summary.json").read_text())["metrics"], config["stage"]["episodes"]


def line(name: str, evaluations: list[tuple[dict[str, float], int]], variant: str = "") -> str:
    runs, counts = zip(*evaluations, strict=True)
    episodes = sum(counts)
    success, positive, total, turns = (sum(run[f"eval/{c}{variant}"] for run in runs) / len(runs) for c in COLUMNS)
    low, high = wilson_interval(round(success * episodes), episodes)
    greedy = [run["eval/success_greedy"] for run in runs if not variant and "eval/success_greedy" in run]
    shown = f"{sum(greedy) / len(greedy):.3f}" if greedy else ""
    each = "  ".join(f"{run['eval/success']:.3f}" for run in runs) if len(runs) > 1 else ""
    start = f"{name:<14}{success:.3f} [{low:.3f}, {high:.3f}]   {shown:<8}"
    return f"{start}{positive:>10.3f}{total:>9.3f}{turns:>8.1f}   {each}".rstrip()


def rates(folders: list[Path]) -> dict[int, float]:
    """Share of the runs that solved it, by held-out seed; only of seeds that all of them played to the end."""
    runs = [{episode.seed: episode.stop for episode in read_episodes(folder, pictures=False)} for folder in folders]
    shared = set.intersection(*({seed for seed, stop in run.items() if stop != "env_error"} for run in runs))
    return {seed: float(np.mean([run[seed] == "success" for run in runs])) for seed in shared}


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Mean success of the second minus the first over the seeds of both, with a normal 95 % interval over seeds."""
    gains = np.array([second[seed] - first[seed] for seed in first.keys() & second.keys()])
    mean, spread = gains.mean(), 1.96 * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{mean:+.3f} [{mean - spread:+.3f}, {mean + spread:+.3f}] on the same {len(gains)} seeds"


def main() -> None:
    lines, baselines, solved = [], {}, {}
    for argument in sys.argv[1:]:
        name, _, named = argument.partition("=")
        folders = [Path(folder) for folder in named.split(",")]
        name = name.replace("_", " ")
        evaluations = [read(folder) for folder in folders]
        lines.append(line(name, evaluations))
        solved[name] = rates(folders)
        for metrics, episodes in evaluations:
            for policy in ("random", "expert"):
                if f"eval/success_{policy}" in metrics:
                    baselines[policy] = line(policy, [(metrics, episodes)], f"_{policy}")
    print(f"{'':<14}{'success (95 %)':<24}{'greedy':<8}{'return > 0':>10}{'return':>9}{'turns':>8}")
    for text in filter(None, [baselines.get("random"), *lines, baselines.get("expert")]):
        print(text)
    for (before, first), (after, second) in pairwise(solved.items()):
        print(f"{after} - {before}: {difference(first, second)}")


if __name__ == "__main__":
    main()
