"""Runs held against each other: `python -m vlm_agents.compare FOLDER...`.

Reads run directories, and writes comparison.md, comparison.csv and comparison.png. What its figures are, and what they
can't say, stands in docs/compare.md.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from vlm_agents import sweeps, tracking
from vlm_agents.errors import ConfigError, VlmAgentsError, harmless
from vlm_agents.files import atomic_write, writing
from vlm_agents.standings import chosen_baseline, game, ranking
from vlm_agents.tables import Comparison, markdown, rows_as_csv

EPILOG = """\
A FOLDER is a run of stage=ppo or stage=eval, or holds such runs, as the folder of a sweep does:
  python -m vlm_agents.compare multirun/mine/ppo
Runs of one game and label that differ in their seeds are pooled. The label is the settings that tell runs apart, or
those of --by, or is given: after_SFT=outputs/a/eval,outputs/b/eval
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong as all of our commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. --help shows the usage")


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vlm_agents.compare",
        description="Hold runs against each other: success with intervals, rank, differences, steps, time.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="runs, folders of runs, or NAME=FOLDER,FOLDER")
    parser.add_argument("--by", metavar="KEY,KEY", default="", help="settings that make the label, as in algo.name")
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are held against; the first, unless given")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where the files go; the one FOLDER, or ./comparison"
    )
    parser.add_argument(
        "--reference",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="somebody else's success: a dashed line in the picture; may be repeated",
    )
    return parser.parse_intermixed_args(words)


def references_of(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not name.strip() or not 0 <= share <= 1:
            told = f"'{word}' is no NAME=VALUE with a success from 0 to 1, as in 'RL4VLM 7B=0.894'"
            raise ConfigError(f"--reference {told}")
        if found.setdefault(name := sweeps.name_of(name), share) != share:
            raise ConfigError(f"--reference gives {name} two values, {found[name]:g} and {share:g}: name them apart")
    return found


def compared(asked: argparse.Namespace, command: str) -> Comparison:
    references = references_of(asked.reference)
    runs, left_out = sweeps.found(asked.folders)
    pooled = sweeps.give_labels(runs, [key for key in asked.by.split(",") if key])
    baseline = chosen_baseline(asked.baseline, runs)
    rng = np.random.default_rng(0)
    games = [game(name, own, baseline, rng) for name, own in sweeps.games(runs).items()]
    return Comparison(command, baseline, runs, games, ranking(games), left_out, pooled, references)


# ---- the command -----------------------------------------------------------------------------------------------------
def write(it: Comparison, out: Path) -> list[Path]:
    from vlm_agents.charts import picture  # matplotlib

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    contents = {"md": harmless(markdown(it)), "csv": rows_as_csv(it), "png": picture(it.games, it.references)}
    for ending, content in contents.items():
        atomic_write(out / f"comparison.{ending}", content)
    return [out / f"comparison.{ending}" for ending in contents]


def to_trackers(it: Comparison, places: Sequence[Path], files: Sequence[Path]) -> Iterator[str]:
    """Have the MLflow run of each sweep that lies whole in one of the places hold the ranking; a line of each."""
    metrics = {}
    for place in it.places:
        label = re.sub(r"[^A-Za-z0-9.]+", "-", place.label)
        metrics |= {f"compare/rank/{label}": place.rank.mean, f"compare/score/{label}": place.score.mean}
    for sweep in dict.fromkeys(filter(None, (tracking.sweep_of(run.folder) for run in it.runs))):
        if {sweep, *sweep.parents} & set(places):
            yield tracking.tell_sweep(sweep, metrics, files)


def main(words: Sequence[str]) -> int:
    """The exit status."""
    try:
        asked = options(words)
        it = compared(asked, harmless(shlex.join(["python", "-m", "vlm_agents.compare", *words])))
        only = Path(asked.folders[0]) if len(asked.folders) == 1 else None
        holds_runs = only is not None and only.is_dir() and not (only / "config.yaml").exists()
        out = asked.out or (only if only is not None and holds_runs else Path("comparison"))
        files = write(it, out)
        print(harmless(files[0].read_text(encoding="utf-8")))
        for line in to_trackers(it, list(map(Path, asked.folders)), files):
            print(harmless(line))
        print(harmless(f"written: {', '.join(map(str, files))}"), flush=True)
    except VlmAgentsError as error:
        print(f"error: {harmless(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
