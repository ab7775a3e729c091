"""The page that a person opens after a run: one self-contained HTML file.

This only draws. Which numbers, curves and episodes are shown is the stage's choice; nothing here plays, scores or reads
a run directory. The page itself is the package's `report.html` and `report.js`, which find all in one JSON block.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vlm_agents import metrics as names
from vlm_agents.errors import DataError
from vlm_agents.files import atomic_write
from vlm_agents.frames import observations
from vlm_agents.pictures import Picture
from vlm_agents.summary import by_tag
from vlm_agents.tracking import points_in
from vlm_agents.types import Parsed, Prompt, Trajectory, Turn

Points = Sequence[tuple[float, float]]
Interval = tuple[float, float, float]  # a share, and its 95 % interval
TAGGED = {"": "sampled", "_greedy": "greedy", "_random": "random", "_expert": "expert", "_bare": "without its tool"}
BLANK = names.Metric("", "")
DIGITS = 6  # of a curve's numbers, significant ones: what a screen shows is less


class Result(NamedTuple):
    """A policy's figures on one panel, and how many of its episodes ended how, by `Trajectory.stop`. `main` is what the
    run is about; the others stand beside it."""

    policy: str
    success: Interval
    others: Mapping[str, float | None]
    ends: Mapping[str, int] = {}
    main: bool = True


class Curve(NamedTuple):
    """A metric over the run; those that aren't `first` are folded away.

    `bounds`: (low, high) of each point. `marks`: (x, share, low, high) of `marked`, drawn over it.
    """

    name: str
    points: Points
    axis: str
    first: bool = False
    bounds: Sequence[tuple[float, float]] = ()
    marks: Sequence[tuple[float, float, float, float]] = ()
    marked: str = ""


class Shown(NamedTuple):
    """An episode of the page: who played it, and `when`: before or after training, or empty."""

    trajectory: Trajectory
    policy: str
    when: str = ""


class Example(NamedTuple):
    """A row of training data: what is asked, what is to be learned, and what the model says to it, if it was asked."""

    prompt: Prompt
    answer: str
    reply: str | None = None


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) points of each metric in a `metrics.jsonl`, in the file's order; null is left out.

    Of two values at one step the later one counts.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: every stage writes it, so look for its folder's name")
    curves: dict[str, dict[float, float]] = {}
    for point in points_in(path):
        if not math.isnan(point.value):
            curves.setdefault(point.key, {})[point.step] = point.value
    return {key: list(points.items()) for key, points in curves.items()}


def strayed(trajectory: Trajectory) -> int | None:
    """The first turn that left the expert's way; None where none did, or no expert knew a way.

    An action is on the way if it is the advised one, or brings success nearer: there may be several shortest ways.
    """
    for index, turn in enumerate(trajectory.turns):
        before, after = turn.observation.advice, turn.step.observation.advice
        if before is None:
            return None
        if turn.parsed.action == before.action or (turn.step.terminated and turn.step.success):
            continue
        left = math.inf if turn.step.terminated or after is None or after.distance is None else after.distance
        if before.distance is None or left >= before.distance:
            return index
    return None


def lost(trajectory: Trajectory) -> int | None:
    """The turn that cost the success: the env ended the episode there, or the expert found no way from there to its
    end. None where no turn did, as where the turns ran out."""
    if trajectory.success:
        return None
    found = None
    for index, turn in enumerate(trajectory.turns):
        before, after = turn.observation.advice, turn.step.observation.advice
        if turn.step.terminated or (before is not None and after is None and not turn.step.truncated):
            found = index
        elif after is not None:
            found = None
    return found


def write_report(
    path: Path,
    *,
    title: str,
    sentence: str,
    facts: Mapping[str, str] | None = None,
    results: Sequence[Result] = (),
    metrics: Mapping[str, float] | None = None,
    curves: Sequence[Curve] = (),
    episodes: Sequence[Shown] = (),
    examples: Sequence[Example] = (),
) -> None:
    """Write one HTML file that needs nothing else: the `sentence` that says what came of the run, the results with
    their intervals, curves, a player of the episodes, examples, and all `metrics` with their meaning."""
    pool = _Pool()
    columns = list(dict.fromkeys(name for result in results for name in result.others))
    data = {
        "title": title,
        "sentence": sentence,
        "facts": list((facts or {}).items()),
        "columns": columns,
        "results": [
            {
                "policy": result.policy,
                "main": result.main,
                "success": [_finite(value) for value in result.success],
                "others": [_finite(result.others.get(name)) for name in columns],
                "ends": result.ends,
            }
            for result in results
        ],
        "curves": [drawn for drawn in map(_curve, curves) if drawn["points"]],
        "tags": _tags(metrics or {}),
        "groups": _groups(metrics or {}),
        "episodes": [_episode(shown, pool) for shown in episodes],
        "examples": [
            {"prompt": pool.add_messages(example.prompt), "answer": example.answer, "reply": example.reply}
            for example in examples
        ],
        "images": pool.images,
        "messages": pool.messages,
    }
    # Plain ASCII, and no "<" at all: whatever a model wrote, it can't close the script element that holds it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page, script = (_resource(name) for name in ("report.html", "report.js"))
    atomic_write(path, page.replace("{{script}}", script).replace("{{data}}", text))


def _resource(name: str) -> str:
    return resources.files("vlm_agents").joinpath(name).read_text(encoding="utf-8")


def _curve(curve: Curve) -> dict[str, object]:
    metric = names.parts(curve.name).metric or BLANK
    keep = [index for index, point in enumerate(curve.points) if all(map(math.isfinite, point))]
    return {
        "name": curve.name,
        "unit": metric.unit,
        "meaning": metric.meaning,
        "axis": curve.axis,
        "first": curve.first,
        "points": [_short(curve.points[index]) for index in keep],
        "bounds": [_short(curve.bounds[index]) for index in keep] if curve.bounds else [],
        "marks": [_short(mark) for mark in curve.marks],
        "marked": curve.marked,
    }


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _tags(metrics: Mapping[str, float]) -> list[dict[str, object]]:
    """Success by tag: a table a tag, a row a value, a column a policy."""
    panels = {words: by_tag(metrics, variant) for variant, words in TAGGED.items()}
    tables: list[dict[str, object]] = []
    for tag, values in panels["sampled"].items():
        columns = [words for words, panel in panels.items() if tag in panel]
        rows = [
            [value, episodes, [panels[words][tag].get(value, (None, 0))[0] for words in columns]]
            for value, (_, episodes) in values.items()
        ]
        tables.append({"tag": tag, "columns": columns, "rows": rows})
    return tables


def _groups(metrics: Mapping[str, float]) -> list[dict[str, object]]:
    """The metrics as one table a group, a row a metric and a column a variant; names that nobody explained come too."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, value in metrics.items():
        part = names.parts(name)
        column = ", ".join(filter(None, [part.variant, "before" if part.before else ""]))
        found.setdefault(part.group, {}).setdefault(part.base, {})[column] = _finite(value)
    groups: list[dict[str, object]] = []
    for key in sorted(found, key=lambda key: list(names.GROUPS).index(key) if key in names.GROUPS else len(found)):
        group, columns = names.GROUPS.get(key), list(dict.fromkeys(c for row in found[key].values() for c in row))
        groups.append(
            {
                "name": key,
                "title": group.title if group else key,
                "says": group.says if group else "",
                "columns": columns,
                "rows": [
                    [
                        base,
                        *(names.Name(key, base).metric or BLANK),
                        [row.get(column) for column in columns],
                    ]
                    for base, row in found[key].items()
                ],
            }
        )
    return groups


class _Pool:
    """The images and messages of a page: each distinct one is embedded once and referred to by its index."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int, int]] = []  # data URL, width, height
        self.messages: list[tuple[str, list[str | int]]] = []  # role; texts, and the indices of images
        self._index: dict[object, int] = {}

    def add_image(self, picture: Picture) -> int:
        if picture.key not in self._index:
            self._index[picture.key] = len(self.images)
            buffer = io.BytesIO()
            picture.image.save(buffer, "PNG", optimize=True)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            self.images.append((url, *picture.size))
        return self._index[picture.key]

    def add_messages(self, prompt: Prompt) -> list[int]:
        indices = []
        for message in prompt:
            parts = [part if isinstance(part, str) else self.add_image(part) for part in message.parts]
            key = message.role, *parts
            if key not in self._index:
                self._index[key] = len(self.messages)
                self.messages.append((message.role, parts))
            indices.append(self._index[key])
        return indices


def _episode(shown: Shown, pool: _Pool) -> dict[str, object]:
    trajectory = shown.trajectory
    return {
        "env": trajectory.env,
        "seed": str(trajectory.seed),  # a 64-bit seed is more than a JavaScript number holds
        "policy": shown.policy,
        "when": shown.when,
        "strayed": strayed(trajectory),
        "lost": lost(trajectory),
        "stop": trajectory.stop,
        "error": trajectory.error,
        "return": _finite(trajectory.total_reward),
        "turns": [_turn(turn, pool) for turn in trajectory.turns],
        "seen": [
            ([pool.add_image(picture) for picture in seen.images], seen.text) for seen in observations(trajectory)
        ],
    }


def _turn(turn: Turn, pool: _Pool) -> dict[str, object]:
    advice = turn.observation.advice
    return {
        "prompt": pool.add_messages(turn.prompt),
        "reply": _pieces(turn.reply.text, turn.parsed),
        "finish": turn.reply.finish,
        "action": turn.parsed.action,
        "error": turn.parsed.error,
        "expert": advice.action if advice else None,
        "reward": _finite(turn.reward),
        "bonuses": [(name, _finite(value)) for name, value in turn.bonuses.items()],
        "value": _finite(turn.reply.value),
        "metrics": [(name, _finite(value)) for name, value in _figures(turn).items()],
    }


def _figures(turn: Turn) -> dict[str, float]:
    step, rated = turn.step, {} if turn.rating is None else {"rating": turn.rating}
    return {"success": step.success, "legal": step.legal, "changed": step.changed, **step.metrics, **rated}


def _pieces(text: str, parsed: Parsed) -> list[tuple[str, str]]:
    """The reply cut into (kind, text), kind being thought, action or empty.

    Cut here, because the spans count characters and JavaScript counts UTF-16 units.
    """
    spans = [("action", parsed.action_span or (0, 0)), ("thought", parsed.thought_span or (0, 0))]
    cuts = sorted({0, len(text), *(end for _, span in spans for end in span)})
    return [
        (next((kind for kind, (first, last) in spans if first <= start and end <= last), ""), text[start:end])
        for start, end in pairwise(cuts)
    ]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
