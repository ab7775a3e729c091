"""The picture of a comparison: a column a game, above how its labels learned, below where they ended."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_agents.intervals import bands
from vlm_agents.standings import Game, curve

POINTS = 200  # of a curve's mean
FEW = 6  # labels whose bands can still be told apart
STYLES = "--", ":", "-.", (0, (1, 4))


@rc_context({"text.parse_math": False})  # a name with dollars is no formula
def picture(games: Sequence[Game], references: Mapping[str, float]) -> bytes:
    """A PNG. Bands, where there are few labels, are 95 % bootstrap intervals over runs, bars those of the interquartile
    mean; `references` are others' figures, a dashed line each."""
    labels = list(dict.fromkeys(label for game in games for label in game.standings))
    wheel = colormaps["tab10"]
    colours = {label: wheel(index % wheel.N) for index, label in enumerate(labels)}
    dashes = {label: "--" if index // wheel.N % 2 else "-" for index, label in enumerate(labels)}
    height = 3 + 0.6 + 0.25 * len(labels)
    figure = Figure(figsize=(1.5 + 4 * len(games), height), layout="constrained")
    axes = figure.subplots(2, len(games), squeeze=False, height_ratios=[3, 0.6 + 0.25 * len(labels)])
    for column, game in enumerate(games):
        learning, ends = axes[0][column], axes[1][column]
        for standing in game.standings.values():
            own = [curve(run, game.window) for run in standing.runs]
            draw_curves(
                learning,
                [one for one in own if len(one[0])],
                colours[standing.label],
                dashes[standing.label],
                len(labels) <= FEW,
            )
        for (name, value), style in zip(references.items(), STYLES * len(references), strict=False):
            # behind a blank, for matplotlib has no label that begins with _ in a legend
            learning.axhline(value, color="grey", linestyle=style, linewidth=1, label=f" {name}")
        if references:
            learning.legend(fontsize=7)
        learning.set(title=game.name, xlabel="env steps in training")
        for row, label in enumerate(labels):
            if label in game.standings:
                mean, low, high = game.standings[label].iqm
                bar = {"linewidth": 5, "alpha": 0.45, "solid_capstyle": "butt", "dash_capstyle": "butt"}
                ends.plot([low, high], [row, row], dashes[label], color=colours[label], **bar)
                ends.plot([mean], [row], "o", color=colours[label], markersize=4)
        ends.set(xlabel="success, held-out seeds", yticks=range(len(labels)), yticklabels=labels if column == 0 else [])
        ends.set_ylim(len(labels) - 0.5, -0.5)
        for tick, label in zip(ends.get_yticklabels(), labels, strict=True) if column == 0 else ():
            tick.set_color(colours[label])
    axes[0][0].set_ylabel("success")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


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
