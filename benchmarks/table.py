"""A table of finished evaluations: `python benchmarks/table.py base=outputs/x/eval after_ppo=outputs/y/eval`.

One line a name, sampled and greedy. Runs that differ in their seed are pooled, `after_ppo=runs/y,runs/z`: their means,
an interval, and the success of each. All of them played the same held-out seeds, so the interval is over those; how
far another run may fall is only to be seen in the runs themselves. The random and expert baselines are those of the
last run that played them. Below, each name is compared with the one before it, episode by episode of the same held-out
seed: much of what tells two policies' rates apart is luck of the deal, which both share.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from vlm_agents.episodes import read_episodes
from vlm_agents.metrics import wilson_interval
from vlm_agents.weights import flat_settings

COLUMNS = ("success", "positive_return", "return", "episode_length")
# Settings of an env that change nothing about what is dealt under a seed.
SHOWN_ONLY = {"invalid_penalty", "workers", "timeout_s", "observation", "size", "view", "tile_size", "describe"}


def refuse_other_games(folders: list[Path]) -> None:
    """Exit where one seed wouldn't deal the same in all of these evaluations: then no pairing means anything."""
    games = [flat_settings(folder / "config.yaml", "name another run") for folder in folders]
    for folder, game in zip(folders, games, strict=True):
        for key in sorted(games[0].keys() | game.keys()):
            group, _, setting = key.partition(".")
            if group == "env" and setting not in SHOWN_ONLY and game.get(key) != games[0].get(key):
                sys.exit(
                    f"{folders[0]} has {key}={games[0].get(key)}, {folder} {game.get(key)}: one seed isn't the "
                    "same episode there, give each a table of its own"
                )


def read(folder: Path) -> dict[str, float]:
    """The metrics of an evaluation."""
    try:
        metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{folder} is no finished run ({error}): name run directories of stage=eval, as name=outputs/x/eval")
    if "eval/success" not in metrics:
        sys.exit(f"{folder} is no run of stage=eval")
    return metrics


def line(name: str, runs: list[dict[str, float]], low: float, high: float, variant: str = "") -> str:
    success, positive, total, turns = (sum(run[f"eval/{c}{variant}"] for run in runs) / len(runs) for c in COLUMNS)
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


def interval(rates: dict[int, float], runs: int) -> tuple[float, float]:
    """95 % interval of the mean of `rates`, over seeds that `runs` runs have in common.

    It is Wilson's, of as many independent episodes as would spread that much: between one a seed, where luck is all in
    the deal and the runs do alike, and all that were played, where it is all in the sampling. (Kish's effective sample
    size, with a seed as cluster.)
    """
    shares = np.array(list(rates.values()))
    mean, spread = shares.mean(), shares.var(ddof=1) / len(shares)
    episodes = mean * (1 - mean) / spread if spread > 0 else 0.0
    episodes = min(max(episodes, len(shares)), runs * len(shares))
    return wilson_interval(mean * episodes, episodes)


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Mean success of the second minus the first over the seeds of both, with a normal 95 % interval over seeds."""
    gains = np.array([second[seed] - first[seed] for seed in first.keys() & second.keys()])
    mean, spread = gains.mean(), 1.96 * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{mean:+.4f} [{mean - spread:+.4f}, {mean + spread:+.4f}] on the same {len(gains)} seeds"


def main() -> None:
    if len(sys.argv) < 2 or not all("=" in argument for argument in sys.argv[1:]):
        sys.exit(__doc__)
    arguments = [argument.partition("=") for argument in sys.argv[1:]]
    named = {name.replace("_", " "): [Path(folder) for folder in runs.split(",")] for name, _, runs in arguments}
    if len(named) < len(arguments):
        sys.exit("two have one name: a line of the table each, so a name each")
    evaluations = {name: [read(folder) for folder in folders] for name, folders in named.items()}
    refuse_other_games([folder for folders in named.values() for folder in folders])
    solved = {name: rates(folders) for name, folders in named.items()}
    lines, baselines = [], {}
    for name, runs in evaluations.items():
        lines.append(line(name, runs, *interval(solved[name], len(runs))))
        for run in runs:
            for policy in ("random", "expert"):
                if f"eval/success_{policy}" in run:
                    low, high = (run[f"eval/success_{end}_{policy}"] for end in ("low", "high"))
                    baselines[policy] = line(policy, [run], low, high, f"_{policy}")
    print(f"{'':<14}{'success (95 %)':<24}{'greedy':<8}{'return > 0':>10}{'return':>9}{'turns':>8}")
    for text in filter(None, [baselines.get("random"), *lines, baselines.get("expert")]):
        print(text)
    for (before, first), (after, second) in pairwise(solved.items()):
        each = ""
        if len(evaluations[before]) == len(evaluations[after]) > 1:  # else no run has one that it is to be held against
            pairs = zip(evaluations[before], evaluations[after], strict=True)
            each = ", by run " + ", ".join(f"{new['eval/success'] - old['eval/success']:+.3f}" for old, new in pairs)
        print(f"{after} - {before}: {difference(first, second)}{each}")


if __name__ == "__main__":
    main()
