"""Where an env's questions come from: made-up scenes, or files. A seed decides which one is asked."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

from vlm_agents.envs.visual_search.benchmarks import read_benchmark
from vlm_agents.envs.visual_search.generator import generate
from vlm_agents.envs.visual_search.parquet import read_parquet
from vlm_agents.envs.visual_search.pyvision import read_rl
from vlm_agents.envs.visual_search.question import Question
from vlm_agents.envs.visual_search.scene import Scene
from vlm_agents.errors import DataError
from vlm_agents.seeds import held_out, panel_seeds, stable_hash

Asked = tuple[Question, Scene | None]  # a made-up scene is known to an expert, and to nobody else
READERS = {".json": read_rl, ".jsonl": read_benchmark, ".tsv": read_benchmark, ".parquet": read_parquet}


def made_up(level: str) -> Callable[[int], Asked]:
    """Scenes of a level; held-out ones for held-out seeds."""

    def ask(seed: int) -> Asked:
        scene = generate(level, seed)
        return scene.question(), scene

    return ask


class Files:
    """Questions of files: of `train` for training seeds, of `held_out` for the others.

    The first panel seeds are the held-out questions in their order, so that a panel of as many asks each once.
    """

    def __init__(self, env_id: str, train: Sequence[str], held_out: Sequence[str], folder: str | None) -> None:
        self._env_id, self._train, self._held_out = env_id, train, held_out
        self._folder = Path(folder) if folder else None
        if both := {*map(_real, train)} & {*map(_real, held_out)}:
            raise DataError(f"{min(both)} is in env.data and in env.eval_data: what is held out can't be trained on")

    def __call__(self, seed: int) -> Asked:
        if held_out(seed):
            place = self._places.get(seed)
            place = stable_hash("row", seed) % len(self._held_out_rows) if place is None else place
            return self._held_out_rows[place], None
        return self._train_rows[stable_hash("row", seed) % len(self._train_rows)], None

    @cached_property
    def _train_rows(self) -> list[Question]:
        return self._read("env.data", self._train, "to train on")

    @cached_property
    def _held_out_rows(self) -> list[Question]:
        return self._read("env.eval_data", self._held_out, "held out")

    @cached_property
    def _places(self) -> dict[int, int]:
        seeds = panel_seeds(self._env_id, len(self._held_out_rows))
        return {seed: place for place, seed in enumerate(seeds)}

    def _read(self, setting: str, paths: Sequence[str], what: str) -> list[Question]:
        found = [question for path in paths for question in read(Path(path), self._folder)]
        if not found:
            where = f"there is none in {', '.join(paths)}" if paths else f"{setting} names no file"
            raise DataError(f"a question {what} is asked for, and {where}: set {setting}=[questions.json]")
        return found


def read(path: Path, folder: Path | None) -> Iterator[Question]:
    """The questions of a file, by the reader of its ending. DataError for a broken row, or another kind of file."""
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path} is no file of questions: their names end in {', '.join(READERS)}")
    return read_parquet(path) if reader is read_parquet else partial(reader, folder=folder)(path)


def _real(path: str) -> str:
    return str(Path(path).resolve())
