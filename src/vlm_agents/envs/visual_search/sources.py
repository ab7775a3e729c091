"""Where an env's questions come from: made-up scenes, or files. A seed decides which one is asked."""

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vlm_agents.envs.visual_search.benchmarks import read_benchmark
from vlm_agents.envs.visual_search.generator import generate
from vlm_agents.envs.visual_search.parquet import read_parquet
from vlm_agents.envs.visual_search.pyvision import read_rl
from vlm_agents.envs.visual_search.question import Question
from vlm_agents.envs.visual_search.rows import refuse
from vlm_agents.envs.visual_search.scene import Scene
from vlm_agents.errors import DataError
from vlm_agents.progress import say
from vlm_agents.seeds import held_out, row

logger = logging.getLogger(__name__)

Asked = tuple[Question, Scene | None]  # a made-up scene is known to an expert, and to nobody else
READERS: dict[str, Any] = {".json": read_rl, ".jsonl": read_benchmark, ".tsv": read_benchmark, ".parquet": read_parquet}


def made_up(level: str) -> Callable[[int], Asked]:
    """Scenes of a level; held-out ones for held-out seeds."""

    def ask(seed: int) -> Asked:
        scene = generate(level, seed)
        return scene.question(), scene

    return ask


class Files:
    """Questions of files: of `train` for training seeds, of `held_out` for the others."""

    def __init__(
        self, env_id: str, train: Sequence[str], held_out: Sequence[str], folder: str | None, skip_bad: bool
    ) -> None:
        """DataError for a file that isn't there, or of another kind; its rows are read when the first is asked for."""
        self._env_id, self._train, self._held_out = env_id, train, held_out
        self._folder, self._skip_bad = Path(folder) if folder else None, skip_bad
        for path in map(Path, (*train, *held_out)):
            if path.suffix not in READERS:
                raise DataError(f"{path} is no file of questions: their names end in {', '.join(READERS)}")
            if not path.is_file():
                raise DataError(f"no {path}: env.data and env.eval_data name files of questions")
        if both := {*map(_real, train)} & {*map(_real, held_out)}:
            raise DataError(f"{min(both)} is in env.data and in env.eval_data: what is held out can't be trained on")

    def __call__(self, seed: int) -> Asked:
        rows = self._held_out_rows if held_out(seed) else self._train_rows
        return rows[row(seed, self._env_id, len(rows))], None

    @cached_property
    def _train_rows(self) -> list[Question]:
        return self._read("env.data", self._train, "to train on")

    @cached_property
    def _held_out_rows(self) -> list[Question]:
        found = self._read("env.eval_data", self._held_out, "held out")
        if multiprocessing.parent_process() is None:  # else each worker would say it
            say(f"{len(found)} held-out questions: a panel of as many (stage.episodes) asks each once")
        return found

    def _read(self, setting: str, paths: Sequence[str], what: str) -> list[Question]:
        found = [
            question
            for path in map(Path, paths)
            for question in read(path, path.stat().st_mtime_ns, self._folder, self._skip_bad)
        ]
        if not found:
            where = f"there is none in {', '.join(paths)}" if paths else f"{setting} names no file"
            raise DataError(f"a question {what} is asked for, and {where}: set {setting}=[questions.json]")
        return found


@cache
def read(path: Path, changed: int, folder: Path | None, skip_bad: bool) -> tuple[Question, ...]:
    """The questions of a file, by the reader of its ending; once for all envs of this process, unless it was `changed`.
    DataError for a broken row, which is told and left out with `skip_bad`."""
    broken = _told if skip_bad else refuse
    reader = READERS[path.suffix]
    if reader is read_parquet:
        return tuple(read_parquet(path, broken=broken))
    return tuple(reader(path, folder=folder, broken=broken))


def _told(error: DataError) -> None:
    logger.warning("%s; left out", error)


def _real(path: str) -> str:
    return str(Path(path).resolve())
