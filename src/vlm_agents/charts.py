"""The picture of a comparison: a column a game, above how its labels learned, where that is known, below where they
ended."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_agents.intervals import bands
from vlm_agents.standings import Game, Standing, curve

POINTS = 200  # of a curve's mean
BANDED = 6  # labels whose bands can still be told apart
BAR: dict[str, Any] = {"linewidth": 5, "alpha": 0.35, "solid_capstyle": "butt"}
MEAN: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6}
RUN: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 4}
GREEDY: dict[str, Any] = {**MEAN, "markerfacecolor": "none"}
STYLES = "--", ":", "-.", (0, (1, 4))


@rc_context({"text.parse_math": False})  # a name with dollars is no formula
def picture(games: Sequence[Game], references: Mapping[str, float]) -> bytes:
    """A PNG. Bands, where there are few labels, are 95 % bootstrap intervals over runs. Bars are the table's 95 %
    intervals, with a dot for the mean, a small one for each run and a ring for the mean of greedy play. Lines are what
    was before training, and `references`, others' figures, dashed."""
    labels = list(dict.fromkeys(label for game in games for label in game.standings))
    wheel = colormaps["tab10"]
    colours = {label: wheel(index % wheel.N) for index, label in enumerate(labels)}
    dashes = {label: "--" if index // wheel.N % 2 else "-" for index, label in enumerate(labels)}
    lines: dict[str, Artist] = {}
    curves = [
        {
            label: [one for one in (curve(run, game.window) for run in standing.runs) if len(one[0])]
            for label, standing in game.standings.items()
        }
        for game in games
    ]
    heights = [3.0] * any(own for those in curves for own in those.values()) + [0.6 + 0.25 * len(labels)]
    figure = Figure(figsize=(1.5 + 4 * len(games), sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(heights), len(games), squeeze=False, height_ratios=heights)
    for column, (game, those) in enumerate(zip(games, curves, strict=True)):
        axes[0][column].set_title(game.name)
        if len(heights) > 1:
            for label, own in those.items():
                draw_curves(axes[0][column], own, colours[label], dashes[label], len(labels) <= BANDED)
            axes[0][column].set_xlabel("env steps in training")
        ends = axes[-1][column]
        for row, label in enumerate(labels):
            if label in game.standings:
                draw_end(ends, row, game.standings[label], colours[label])
        known = {} if game.before is None else {"before training": game.before}
        styles = ["-"] * len(known) + [*STYLES] * len(references)
        for (name, value), style in zip([*known.items(), *references.items()], styles, strict=False):
            lines[name] = ends.axvline(value, color="grey", linestyle=style, linewidth=1)
        ends.set(xlabel="success, held-out seeds", yticks=range(len(labels)), yticklabels=labels if column == 0 else [])
        ends.set_ylim(len(labels) - 0.5, -0.5)
        for tick, label in zip(ends.get_yticklabels(), labels, strict=True) if column == 0 else ():
            tick.set_color(colours[label])
    if len(heights) > 1:
        axes[0][0].set_ylabel("success")
    draw_legend(figure, lines, 2 * len(games) + 1)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def draw_legend(figure: Figure, lines: Mapping[str, Artist], columns: int) -> None:
    shapes = {
        "95 % interval": Line2D([], [], color="grey", **BAR),
        "mean": Line2D([], [], color="grey", **MEAN),
        "a run": Line2D([], [], color="grey", **RUN),
        "greedy": Line2D([], [], color="grey", **GREEDY),
    }
    # behind a blank, for matplotlib has no label that begins with _ in a legend
    names = [f" {name}" for name in [*shapes, *lines]]
    figure.legend([*shapes.values(), *lines.values()], names, loc="outside lower center", ncols=columns, fontsize=8)


def draw_end(axis: Axes, row: int, its: Standing, colour: tuple[float, ...]) -> None:
    mean, low, high = its.typical
    axis.plot([low, high], [row, row], color=colour, **BAR)
    axis.plot(its.scores, [row] * len(its.runs), color=colour, **RUN)
    axis.plot([mean], [row], color=colour, **MEAN)
    if "greedy" in its.figures:
        axis.plot([its.figures["greedy"]], [row], color=colour, **GREEDY)


def draw_curves(
    axis: Axes,
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    colour: tuple[float, ...],
    dashes: str,
    banded: bool,
) -> None:
    """The mean of a label's runs where all of them have been; if `banded` with its band, and a thin line a run where
    there are few."""
    if not curves:
        return
    for steps, success in curves if banded and len(curves) <= 3 else ():
        axis.plot(steps, success, color=colour, alpha=0.3, linewidth=0.7)
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(first, max(first, last), POINTS)
    through = np.array([np.interp(grid, steps, success) for steps, success in curves])
    axis.plot(grid, through.mean(axis=0), dashes, color=colour, linewidth=1.8)
    if banded and len(curves) > 1:
        low, high = bands(through, np.random.default_rng(0))
        axis.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
