"""What an env step costs as things grow: `python benchmarks/growth.py`, into docs/pictures/growth.png and a table.

Processor seconds of one thread, of a rollout and of an update, for each env step; random weights, so that every reply
is as long as it may be and every episode lasts to its end. One thing grows at a time, from the same start.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, ScalarFormatter
from speed import composed, ours

from vlm_agents.config import RunConfig

PICTURE = Path(__file__).parents[1] / "docs/pictures/growth.png"
ENVS, TURNS, REPLY = 32, 4, 16
MODEL = ("model=tiny_qwen2_vl", "model.weights=random", "hardware.threads=1")
GAME = ("stage=ppo", "env=minigrid", "algo=reinforce", "name=growth", *MODEL)


class Axis(NamedTuple):
    """What grows; its sizes, of which `words` makes settings; and the power of it that a step's work grows with."""

    name: str
    sizes: tuple[int, ...]
    words: Callable[[int], tuple[str, ...]]
    power: float


def turns(history: str, count: int) -> tuple[str, ...]:
    return f"env.max_steps={count}", f"prompt.history={history}"


AXES = (
    Axis("envs at a time", (8, 16, 32, 64, 128), lambda n: (f"stage.num_envs={n}", f"stage.episodes={n}"), 0),
    Axis("turns, the last four told", (8, 16, 32), partial(turns, "last_k"), 0),
    Axis("turns, the chat kept whole", (2, 4, 8, 16), partial(turns, "full"), 1),
    Axis("pixels of a picture's cell, a side", (28, 56, 84, 112), lambda n: (f"env.tile_size={n}",), 2),
    Axis("tokens of a reply", (8, 16, 32, 64), lambda n: (f"prompt.max_reply_tokens={n}",), 1),
    Axis("layers", (2, 4, 8, 16), lambda n: (f"model.architecture.text_config.num_hidden_layers={n}",), 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    measure(composed(*GAME, *words()))  # warms up
    figure, plots = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    print("| what grows | from, to | a step's rollout grows | its update | power: rollout, update | of its work |")
    print("|---|---|---|---|---|---|")
    for axis, plot in zip(AXES, plots.flat, strict=True):
        found = np.array([median_of(composed(*GAME, *words(*axis.words(size))), repeats) for size in axis.sizes])
        ends = found[-1] / found[0]
        powers = np.log(ends) / np.log(axis.sizes[-1] / axis.sizes[0])
        print(
            f"| {axis.name} | {axis.sizes[0]}, {axis.sizes[-1]} | {ends[0]:.1f} times | {ends[1]:.1f} times | "
            f"{powers[0]:.2f}, {powers[1]:.2f} | {axis.power:g} |",
            flush=True,
        )
        draw(plot, axis, found)
    figure.savefig(PICTURE, dpi=110)


def words(*grown: str) -> tuple[str, ...]:
    """The start, with what has grown in its place."""
    start = (f"stage.num_envs={ENVS}", f"stage.episodes={ENVS}", f"env.max_steps={TURNS}")
    return (*start, f"prompt.max_reply_tokens={REPLY}", *grown)


def median_of(cfg: RunConfig, repeats: int) -> tuple[float, float]:
    found = [measure(cfg) for _ in range(repeats)]
    return median(one for one, _ in found), median(one for _, one in found)


def measure(cfg: RunConfig) -> tuple[float, float]:
    """Processor seconds of a rollout and of an update, each for an env step."""
    found = ours(cfg, time.process_time)
    return found.rollout / found.steps, found.update / found.steps


def draw(plot: Axes, axis: Axis, found: np.ndarray) -> None:
    sizes = np.array(axis.sizes)
    for part, name in enumerate(("rollout", "update")):
        plot.plot(sizes, 1e3 * found[:, part], marker="o", label=name)
    plot.plot(sizes, 1e3 * found[0].max() * (sizes / sizes[0]) ** axis.power, ":", color="grey", label="its work")
    plot.set(xscale="log", yscale="log", xlabel=axis.name, ylabel="ms an env step", xticks=sizes, xticklabels=sizes)
    plot.minorticks_off()
    plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.yaxis.set_major_formatter(ScalarFormatter())
    plot.margins(y=0.3)
    plot.legend(frameon=False)


if __name__ == "__main__":
    main()
