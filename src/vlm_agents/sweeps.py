"""The runs in folders: which there are, which game each played, under which label it is compared.

Reads run directories of stage=ppo and stage=eval by their files alone. Knows no statistics.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_agents.errors import ConfigError, DataError, did_you_mean, harmless
from vlm_agents.outcomes import PANEL, Outcome, read_outcomes
from vlm_agents.tracking import points_in
from vlm_agents.types import UNKNOWN
from vlm_agents.weights import flat_settings

PLAYING = ("ppo", "eval")
# Settings of an env that change nothing about what is dealt under a seed.
SHOWN_ONLY = {"invalid_penalty", "workers", "timeout_s", "observation", "size", "view", "tile_size", "describe"}
SHOWN_ONLY |= {"expert"}
# Settings, and groups of them, that are no part of what is compared: who and where, and what only is kept.
APART = {"seed", "name", "run_dir", "hardware", "tracking", "env.workers", "env.timeout_s"}
APART |= {f"stage.{it}" for it in ("checkpoint_every", "keep_checkpoints", "report_episodes", "baselines", "num_envs")}
# of a server, its model says what is compared
APART |= {f"{part}.remote.{it}" for part in ("stage", "referee", "rollout") for it in ("server", "wait_s")}
NEEDED = {"stage.name": str, "stage.episodes": int, "seed": int, "env.id": str}  # settings that every run has
NAMING = (".name", ".format", ".family")  # settings that choose a part: they name it better than what is in it


@dataclass
class Played:
    """A run that played held-out seeds, finished or not."""

    folder: Path
    settings: Mapping[str, Any]  # by dotted names
    metrics: Mapping[str, float]  # of summary.json
    history: Mapping[int, Mapping[str, float]]  # of metrics.jsonl, by step
    outcomes: Sequence[Outcome]
    finished: bool = True
    label: str = field(default="", compare=False)

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @cached_property
    def game(self) -> tuple[tuple[str, Any], ...]:
        """The settings that decide what a held-out seed deals: where they are equal, runs can be paired."""
        return tuple(
            (key, str(value))
            for key, value in sorted(self.settings.items())
            if key.startswith("env.") and key.removeprefix("env.") not in SHOWN_ONLY
        )

    @cached_property
    def solved(self) -> dict[int, bool]:
        """In the end, as sampled: was it, by held-out seed? Without those of which nobody knows that."""
        return {seed: one.success for seed, one in self.panel("").items()}

    def panel(self, variant: str) -> dict[int, Outcome]:
        """What came of each held-out seed in the end, played in this way; without those of which nobody knows."""
        return self._played(max((one.step for one in self.outcomes), default=0), variant)

    def panel_before(self, variant: str) -> dict[int, Outcome]:
        """The same before training; empty for an evaluation."""
        return self._played(0, variant) if self.settings["stage.name"] == "ppo" else {}

    def scripted(self, policy: str) -> dict[int, Outcome]:
        """The same of random play or the expert, whenever that was played."""
        return self._played(None, f"_{policy}")

    def _played(self, step: int | None, variant: str) -> dict[int, Outcome]:
        those = (one for one in self.outcomes if one.variant == variant and step in (None, one.step))
        return {one.seed: one for one in those if one.stop not in UNKNOWN}


def found(arguments: Iterable[str]) -> tuple[list[Played], list[str]]:
    """The runs that the arguments name, FOLDER or NAME=FOLDER,FOLDER, and a line for each that is left out.

    ConfigError for a folder that isn't there, or a run that is no such run; DataError where nothing can be compared.
    """
    runs: dict[Path, Played] = {}
    left_out: list[str] = []
    for argument in arguments:
        name, _, folders = argument.partition("=") if not os.path.exists(argument) else ("", "", "")
        label = name_of(name) if folders else ""
        for word in folders.split(",") if label else [argument]:
            if not os.path.isdir(word):  # unlike Path's, of any word; and "" is none
                told = f"'{word[:200]}' is no folder"
                raise ConfigError(f"{told}: name run directories, folders of them, or NAME=FOLDER,FOLDER")
            place = Path(word)
            for folder in directories(place, left_out):
                try:
                    run = read(folder)
                except DataError as error:
                    left_out.append(f"{folder}: {error}")
                    continue
                if run is None and folder == place:
                    raise ConfigError(f"{folder} is no run of stage=ppo or stage=eval, which play held-out seeds")
                if run is not None:
                    known = runs.setdefault(folder.resolve(), run)
                    if known is not run and known.label != label:
                        raise ConfigError(f"{folder} is given under two names: a run has one line in the table")
                    known.label = label
    if not runs:
        why = f", but for {'; '.join(left_out)}" if left_out else ""
        raise DataError(f"no finished run of stage=ppo or stage=eval in {' '.join(arguments)}{why}")
    return list(runs.values()), left_out


def name_of(word: str) -> str:
    """A name given in the command line, as it stands in a line of a table."""
    return " ".join(harmless(word).replace("_", " ").split())


def directories(place: Path, left_out: list[str]) -> Iterator[Path]:
    """The run directories in a folder, itself included, in the order of their names; 10 comes behind 9. What can't be
    looked into is added to `left_out`."""

    def closed(error: OSError) -> None:
        left_out.append(f"{error.filename}: can't be read ({error.strerror})")

    for here, folders, files in os.walk(place, onerror=closed):
        folders.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
        if "config.yaml" in files:
            yield Path(here)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def read(folder: Path) -> Played | None:
    """One run; None where it is of a stage that plays no panel. DataError, without its name, where it has nothing yet
    that could be compared, or is damaged. Of a run that still trains, the newest panel that is whole stands for all."""
    try:
        settings = flat_settings(folder / "config.yaml", "")
    except DataError as error:
        raise DataError("config.yaml is damaged") from error
    stage = settings.get("stage.name")
    if isinstance(stage, str) and stage not in PLAYING:
        return None
    if wrong := [key for key, kind in NEEDED.items() if not isinstance(settings.get(key), kind)]:
        raise DataError(f"config.yaml is damaged ({', '.join(wrong)})")
    try:
        finished = (folder / "DONE").exists()
        history = by_step(folder / "metrics.jsonl")
        metrics = figures(folder / "summary.json") if finished else {}
        outcomes = read_outcomes(folder, trained=stage == "ppo")
        if stage == "ppo" and not finished:
            outcomes = whole_panels(outcomes)
        elif stage == "ppo":
            last = max((step for step, record in history.items() if "eval/success" in record), default=0)
            if max((one.step for one in outcomes), default=0) < last:
                raise DataError(f"{PANEL} is damaged: the panel of step {last}, the last, isn't there")
        run = Played(folder, settings, metrics, history, outcomes, finished)
    except OSError as error:
        raise DataError(f"{Path(error.filename).name} can't be read ({error.strerror})") from error
    if not run.solved:
        raise DataError("no held-out seed was played to its end")
    return run


def whole_panels(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Without a panel that is just being played. DataError where none was played since training began."""
    counts = Counter(one.step for one in outcomes if not one.variant)
    kept = [one for one in outcomes if counts[one.step] == max(counts.values())]
    if not any(one.step for one in kept):
        raise DataError("not finished, and no held-out seeds played since it began (stage.eval_every has them played)")
    return kept


def figures(path: Path) -> dict[str, float]:
    """The metrics of summary.json that have a value."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return {name: float(value) for name, value in metrics.items() if value is not None}
    except FileNotFoundError as error:
        raise DataError("summary.json is missing") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"summary.json is damaged ({error})") from error


def by_step(path: Path) -> dict[int, dict[str, float]]:
    """All that metrics.jsonl says of each step; of what a resumed run wrote again, the last. A damaged line is left out
    with a warning."""
    steps: dict[int, dict[str, float]] = {}
    for point in points_in(path):
        if not math.isnan(point.value):
            steps.setdefault(point.step, {})[point.key] = point.value
    return dict(sorted(steps.items()))


# ---- labels ----------------------------------------------------------------------------------------------------------
def give_labels(runs: Sequence[Played], by: Sequence[str]) -> list[str]:
    """Label the runs that have no name, by the settings `by`, or else by those that tell them apart. Returns the
    settings in which runs of one label differ.

    A setting that goes with the game (where each has its own), or with those before it, tells nothing more, nor does
    stage.init where each seed goes on from its own.
    """
    unnamed = [run for run in runs if not run.label]
    differing = [key for key in settings_of(runs) if len({str(run.settings.get(key)) for run in runs}) > 1]
    if wrong := next((key for key in by if not any(key in run.settings for run in runs)), None):
        raise ConfigError(f"--by {wrong}: no such setting.{did_you_mean(wrong, settings_of(runs))}")
    keys = list(by)
    for key in () if by else sorted(differing, key=prominence):
        if key == "algo.name" or tells(key, keys, unnamed):
            keys.append(key)
    for run in unnamed:
        run.label = words(run, keys, alone=len(keys) == 1)
    cells = {(run.label, run.game) for run in runs}
    return [key for key in differing if any(len(values(key, runs, *cell)) > 1 for cell in cells)]


def settings_of(runs: Iterable[Played]) -> list[str]:
    """The settings that may tell what is compared."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    games = {key for run in runs for key, _ in run.game}
    return [key for key in keys if key not in APART | games and key.split(".")[0] not in APART]


def prominence(key: str) -> tuple[bool, bool, str]:
    """The algorithm first, then what chooses a part."""
    return key != "algo.name", not key.endswith(NAMING), key


def tells(key: str, others: Sequence[str], runs: Iterable[Played]) -> bool:
    """Do runs of one game differ in `key` that don't in `others`?"""
    cells: dict[tuple, set[str]] = {}
    for run in runs:
        own = [run.seed] if key == "stage.init" else []
        cell = (run.game, *own, *(str(run.settings.get(other)) for other in others))
        cells.setdefault(cell, set()).add(str(run.settings.get(key)))
    return any(len(values) > 1 for values in cells.values())


def words(run: Played, keys: Sequence[str], alone: bool) -> str:
    """`grpo`, or `grpo lr=0.0001`; of a run among its like the name of its stage."""
    parts = []
    for key in keys:
        value = run.settings.get(key, run.settings.get("stage.policy") if key == "algo.name" else None)
        value = "null" if value is None else value
        named = key.endswith(NAMING) or (alone and isinstance(value, str))
        parts.append(str(value) if named else f"{key.split('.', 1)[-1]}={value}")
    found = " ".join(parts) or run.settings.get("algo.name") or run.settings["stage.name"]
    return " ".join(harmless(found).split())


def values(key: str, runs: Iterable[Played], label: str, game: tuple) -> set[str]:
    return {str(run.settings.get(key)) for run in runs if (run.label, run.game) == (label, game)}


# ---- games -----------------------------------------------------------------------------------------------------------
def games(runs: Sequence[Played]) -> dict[str, list[Played]]:
    """The runs by game, under a name that tells the games apart. DataError where there are several labels, and none of
    the games has two of them: one seed isn't the same episode there, so nothing could be held against anything."""
    grouped: dict[tuple, list[Played]] = {}
    for run in runs:
        grouped.setdefault(run.game, []).append(run)
    if len({run.label for run in runs}) > 1 and all(len({run.label for run in one}) == 1 for one in grouped.values()):
        first, second = (one[0] for one in list(grouped.values())[:2])
        key = next(key for key, _ in {**dict(first.game), **dict(second.game)}.items() if other(key, first, second))
        raise DataError(
            f"{first.folder} has {key}={first.settings.get(key)}, {second.folder} {second.settings.get(key)}: one seed "
            "isn't the same episode there, give each a comparison of its own"
        )
    rivals = [one[0] for one in grouped.values()]
    plain = [run.settings["env.id"].rpartition("/")[2] for run in rivals]
    named = {}
    for run, name in zip(rivals, plain, strict=True):
        keys = [key for key, _ in run.game if any(other(key, run, rival) for rival in rivals)]
        told = [f"{key.removeprefix('env.')}={run.settings[key]}" for key in keys] if plain.count(name) > 1 else []
        named[" ".join([name, *told])] = grouped[run.game]
    return named


def other(key: str, first: Played, second: Played) -> bool:
    return str(first.settings.get(key)) != str(second.settings.get(key))
