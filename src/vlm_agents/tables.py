"""A comparison as text: Markdown for people, CSV for programs."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from vlm_agents.intervals import Difference, Interval
from vlm_agents.progress import duration
from vlm_agents.run import commit
from vlm_agents.standings import FEW, Game, Place, Standing, open_games, watched
from vlm_agents.sweeps import Played

SCORE = "{:.3f} [{:.3f}, {:.3f}]"
GAIN = "{:+.3f} [{:+.3f}, {:+.3f}]"
MANY = 5  # runs; of fewer, a bootstrap over pairs of runs has no width to speak of


@dataclass
class Comparison:
    """All that there is to tell."""

    command: str
    baseline: str
    runs: Sequence[Played]
    games: Sequence[Game]
    places: Sequence[Place]
    left_out: Sequence[str]  # runs, a line each
    pooled: Sequence[str]  # settings in which runs of one label differ
    references: Mapping[str, float]


# ---- as Markdown -----------------------------------------------------------------------------------------------------
def markdown(it: Comparison) -> str:
    commits = Counter(read_commit(run.folder) for run in it.runs)
    facts = [f"`{it.command}`", f"commit {commit()[:12] + commit()[40:]}" if commit() else "", f"{len(it.runs)} runs"]
    if any(commits):
        told = [f"{count} by {name[:12] + name[40:] or 'an unknown one'}" for name, count in commits.most_common()]
        facts.append(f"made by commit: {', '.join(told)}")
    parts = ["# Comparison", ", ".join(filter(None, facts))]
    if len(it.places) > 1:
        rows = [
            [place.label, str(place.runs), "{:g} [{:g}, {:g}]".format(*place.rank), SCORE.format(*place.score)]
            for place in it.places
        ]
        ranked = len(open_games(it.games))
        where = f"over {ranked} games" if ranked > 1 else "in one game"
        parts += [f"## Ranking {where}", table(["label", "runs", "rank", "score"], rows)]
    for one in it.games:
        rows = [heads(it.baseline), *rows_of(one, it)]
        told = [any(cells) for cells in zip(*rows[1:], strict=True)]  # the columns in which anything stands
        first, *others = (list(compress(row, told)) for row in rows)
        parts += [f"## {one.name}", told_of(one), table(first, others), apart(one)]
    if notes := list(notes_of(it)):
        parts += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    return "\n\n".join(filter(None, parts)) + "\n"


def heads(baseline: str) -> list[str]:
    against = [f"better than {baseline}", f"minus {baseline}"]
    return [
        *("label", "runs", "success", "IQM", "greedy", "each run", "return", "return > 0"),
        *(*against, "steps to 90 %", "training"),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def told_of(one: Game) -> str:
    known = any(own.steps for own in one.standings.values())
    return f"{one.seeds} held-out seeds" + (f"; steps are those to a success of {one.target:.3f}" if known else "")


def rows_of(one: Game, it: Comparison) -> Iterator[list[str]]:
    """A line for each label; random play and the start stand before them, and the expert and other people's figures
    behind."""
    empty = len(heads("")) - 3
    if "random" in one.scripted.keys() - one.standings.keys():
        yield ["random", "", SCORE.format(*one.scripted["random"]), *[""] * empty]
    if one.before is not None:
        yield ["before training", "", f"{one.before:.3f}", "", figure(one.greedy_before), *[""] * (empty - 2)]
    against = len(one.standings[it.baseline].runs) if it.baseline in one.standings else 0
    for own in one.standings.values():
        yield [
            own.label,
            str(len(own.runs)),
            SCORE.format(*own.success),
            SCORE.format(*own.iqm) if own.trimmed else "",
            figure(own.figures.get("greedy")),
            " ".join(f"{score:.3f}" for score in own.scores),
            figure(own.figures["return"]),
            figure(own.figures["positive_return"]),
            chance(own.better, min(len(own.runs), against)) if own.better else "",
            gained(own.gain) if own.gain else "",
            steps_told(own),
            "" if own.seconds is None else duration(own.seconds),
        ]
    if "expert" in one.scripted.keys() - one.standings.keys():
        yield ["expert", "", SCORE.format(*one.scripted["expert"]), *[""] * empty]
    for name, value in it.references.items():
        yield [name, "", f"{value:.3f}", *[""] * empty]


def chance(better: Interval, runs: int) -> str:
    return SCORE.format(*better) if runs >= MANY else figure(better.mean)


def gained(gain: Difference) -> str:
    return GAIN.format(*gain[:3]) if gain.low < gain.high else f"{gain.mean:+.3f}"  # of no width is no interval


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def steps_told(own: Standing) -> str:
    if not own.steps:
        return ""
    reached, median = sum(map(math.isfinite, own.steps)), float(np.median(own.steps))
    shown = f"{median:,.0f}" if math.isfinite(median) else "-"
    return f"{shown} ({reached} of {len(own.steps)})" if 0 < reached < len(own.steps) else shown


def apart(one: Game) -> str:
    """Which labels can be told apart, each pair once, the better one first."""
    if len(one.standings) < 2:
        return ""
    best_first = sorted(one.standings.values(), key=lambda own: -own.success.mean)
    if sum(len(own.runs) >= FEW for own in best_first) < 2:
        return f"Whether any can be told apart takes {FEW} runs of each."
    lines = [f"* {own.label} is better than {', '.join(own.beats)}" for own in best_first if own.beats]
    return "\n".join(["Told apart, and no other pair:", "", *lines]) if lines else "No two can be told apart."


def notes_of_game(one: Game, baseline: str) -> Iterator[str]:
    runs = [run for own in one.standings.values() for run in own.runs]
    fewest = min(runs, key=lambda run: len(run.solved))
    if one.seeds < max(len(run.solved) for run in runs):
        count = len(fewest.solved)
        yield f"on {one.seeds} held-out seeds, which all runs played; {fewest.folder} played fewest, {count}"
    if baseline not in one.standings:
        yield f"{baseline} didn't play it, so that nothing is held against it there"
    if 0 < sum(map(watched, runs)) < len(runs):
        yield "no steps, as not all runs had the panel played in between (stage.eval_every)"
    for own in one.standings.values():
        if len({run.seed for run in own.runs}) < len(own.runs):
            yield f"{own.label}: runs of one seed are counted as several. Are they independent?"
    if one.before == 1:
        yield "was solved before training: it is in no ranking"


def notes_of(it: Comparison) -> Iterator[str]:
    single = sorted({own.label for one in it.games for own in one.standings.values() if len(own.runs) == 1})
    if single:
        yield f"one run, so that its intervals are over held-out seeds alone, of these weights: {', '.join(single)}"
    for one in it.games:
        yield from (f"{one.name}: {note}" for note in notes_of_game(one, it.baseline))
    ranked = {place.label for place in it.places}
    absent = sorted({own for one in it.games for own in one.standings} - ranked)
    if ranked and absent:
        yield f"not ranked, as they didn't play every game: {', '.join(absent)}"
    if it.pooled:
        yield f"runs of one label differ in {', '.join(it.pooled)}"
    for run in it.runs:
        if not run.finished:
            seen = f"step {step}" if (step := max(one.step for one in run.outcomes)) else f"{len(run.solved)} episodes"
            yield f"not finished: {run.folder}, compared as it was at {seen}"
    yield from (f"left out: {line}" for line in it.left_out)


def read_commit(folder: Path) -> str:
    try:
        return (folder / "commit").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# ---- as CSV ----------------------------------------------------------------------------------------------------------
def rows_as_csv(it: Comparison) -> str:
    rows = [
        {
            "game": "all",
            "label": place.label,
            "runs": place.runs,
            **ends("rank", place.rank),
            **ends("iqm", place.score),
        }
        for place in it.places
    ]
    for one in it.games:
        for own in one.standings.values():
            row = {"game": one.name, "label": own.label, "runs": len(own.runs), "seeds": one.seeds}
            row |= {**ends("success", own.success), **ends("iqm", own.iqm), **own.figures}
            row |= ends("better", own.better) if own.better else {}
            row |= {**ends("gain", own.gain), "gain_p": own.gain.p} if own.gain else {}
            row |= {"steps": float(np.median(own.steps))} if own.steps else {}
            row |= {"seconds": own.seconds, "before": one.before}
            row |= {"each_run": " ".join(f"{score:.6g}" for score in own.scores), "beats": "; ".join(own.beats)}
            rows.append(row)
        for policy, success in one.scripted.items():
            rows.append({"game": one.name, "label": policy, "seeds": one.seeds, **ends("success", success)})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def ends(name: str, value: Sequence[float]) -> dict[str, float]:
    return {name: value[0], f"{name}_low": value[1], f"{name}_high": value[2]}
