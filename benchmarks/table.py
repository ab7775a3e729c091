"""A table of finished evaluations: `python benchmarks/table.py base=outputs/x/eval after_ppo=outputs/y/eval`.

One line a name, sampled and greedy. Runs that differ in their seed are pooled, `after_ppo=runs/y,runs/z`:
their means, the interval over all their episodes, which says nothing of how far another seed may fall, and the success
of each. The random and expert baselines are those of the last run that played them.
"""

import json
import sys
from pathlib import Path

import yaml

from vlm_agents.stages.playing import wilson_interval

COLUMNS = ("success", "positive_return", "return", "episode_length")


def line(name: str, folders: list[Path], variant: str = "") -> str:
    runs = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in folders]
    episodes = sum(yaml.safe_load((folder / "config.yaml").read_text())["stage"]["episodes"] for folder in folders)
    success, positive, total, turns = (sum(run[f"eval/{c}{variant}"] for run in runs) / len(runs) for c in COLUMNS)
    low, high = wilson_interval(round(success * episodes), episodes)
    greedy = [run["eval/success_greedy"] for run in runs if not variant and "eval/success_greedy" in run]
    shown = f"{sum(greedy) / len(greedy):.3f}" if greedy else ""
    each = "  ".join(f"{run['eval/success']:.3f}" for run in runs) if len(runs) > 1 else ""
    start = f"{name:<14}{success:.3f} [{low:.3f}, {high:.3f}]   {shown:<8}"
    return f"{start}{positive:>10.3f}{total:>9.3f}{turns:>8.1f}   {each}".rstrip()


def main() -> None:
    lines, baselines = [], {}
    for argument in sys.argv[1:]:
        name, _, named = argument.partition("=")
        folders = [Path(folder) for folder in named.split(",")]
        lines.append(line(name.replace("_", " "), folders))
        for folder in folders:
            metrics = json.loads((folder / "summary.json").read_text())["metrics"]
            for policy in ("random", "expert"):
                if f"eval/success_{policy}" in metrics:
                    baselines[policy] = line(policy, [folder], f"_{policy}")
    print(f"{'':<14}{'success (95 %)':<24}{'greedy':<8}{'return > 0':>10}{'return':>9}{'turns':>8}")
    for text in filter(None, [baselines.get("random"), *lines, baselines.get("expert")]):
        print(text)


if __name__ == "__main__":
    main()
