"""Learning curves of PPO runs as one picture: `python benchmarks/curves.py OUT.png RUN_DIRECTORY ... [NAME=VALUE ...]`.

Runs of the same settings and other seeds: a thin line each, and their mean. Success, share of returns above zero, and
return, per iteration, as sampled while training. A dashed line for every NAME=VALUE, such as "RL4VLM 7B=0.894", whose
success is a return above zero.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot

matplotlib.use("Agg")
PANELS = {"success": "success", "positive_return": "return > 0", "return": "return"}


def curve(folder: Path, name: str) -> dict[int, float]:
    """Iteration -> the metric; of a line that a resumed run wrote again, the last one counts."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


def main() -> int:
    if len(sys.argv) < 3 or not Path(sys.argv[1]).suffix:  # without OUT the first run would stand for it
        print(__doc__, file=sys.stderr)
        return 2
    folders = [Path(argument) for argument in sys.argv[2:] if "=" not in argument]
    references = dict(argument.rsplit("=", 1) for argument in sys.argv[2:] if "=" in argument)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3), layout="constrained")
    for axis, (panel, label) in zip(axes, PANELS.items(), strict=True):
        curves = [curve(folder, f"rollout/{panel}") for folder in folders]
        shared = sorted(set.intersection(*(set(single) for single in curves)))
        if not shared:
            sys.exit(f"{', '.join(map(str, folders))} have no iteration in common: name runs of stage=ppo")
        for single in curves:
            axis.plot(list(single), list(single.values()), color="tab:blue", alpha=0.35, linewidth=0.8)
        mean = np.mean([[single[step] for step in shared] for single in curves], axis=0)
        axis.plot(
            shared,
            mean,
            color="tab:blue",
            linewidth=2,
            label=f"mean of {len(folders)} runs" if len(folders) > 1 else "one run",
        )
        axis.set(xlabel="iteration", ylabel=label)
    for (name, value), style in zip(references.items(), ("--", ":", "-.", (0, (1, 4))), strict=False):
        axes[1].axhline(float(value), color="grey", linestyle=style, linewidth=1, label=name)
    axes[1].legend(fontsize=8)
    figure.savefig(sys.argv[1], dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
