"""A table of finished evaluations: `python benchmarks/table.py base=outputs/x/eval after_ppo=outputs/y/eval`.

One line a run, sampled and greedy; the random and expert baselines are those of the last run that played them.
"""

import json
import sys
from pathlib import Path


def line(name: str, metrics: dict[str, float], variant: str = "") -> str:
    success, low, high = (metrics[f"eval/success{bound}{variant}"] for bound in ("", "_low", "_high"))
    greedy = metrics.get("eval/success_greedy")
    shown = f"{greedy:.3f}" if greedy is not None and not variant else ""
    return (
        f"{name:<14}{success:.3f} [{low:.3f}, {high:.3f}]   {shown:<8}"
        f"{metrics[f'eval/return{variant}']:>7.3f}{metrics[f'eval/episode_length{variant}']:>8.1f}"
    )


def main() -> None:
    lines, baselines = [], {}
    for argument in sys.argv[1:]:
        name, folder = argument.split("=", 1)
        metrics = json.loads((Path(folder) / "summary.json").read_text())["metrics"]
        lines.append(line(name.replace("_", " "), metrics))
        for policy in ("random", "expert"):
            if f"eval/success_{policy}" in metrics:
                baselines[policy] = line(policy, metrics, f"_{policy}")
    print(f"{'':<14}{'success (95 %)':<24}{'greedy':<8}{'return':>7}{'turns':>8}")
    for text in filter(None, [baselines.get("random"), *lines, baselines.get("expert")]):
        print(text)


if __name__ == "__main__":
    main()
