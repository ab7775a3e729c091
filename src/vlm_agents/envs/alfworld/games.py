"""Where ALFWorld's games come from: made here, or from ALFWorld's files. A seed decides which one is played."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

from vlm_agents.config import AlfWorldConfig
from vlm_agents.envs.alfworld.game import Game, read_game, read_task, solvable
from vlm_agents.envs.alfworld.generator import generate
from vlm_agents.envs.alfworld.goals import KINDS
from vlm_agents.errors import DataError
from vlm_agents.seeds import held_out, row, stable_hash

GAME = "game.tw-pddl"
HOME = "ALFWORLD_DATA"
SKIPPED = re.compile("movable|Sliced")  # in the name of a game that ALFWorld doesn't play


def games(cfg: AlfWorldConfig) -> Callable[[int], Game]:
    """What gives the game of a seed. DataError where the files that are asked for aren't there."""
    kinds = tuple(cfg.tasks or KINDS)
    if cfg.data is None:
        return lambda seed: generate(cfg.level, kinds, seed)
    return Files(cfg.id, cfg.data, cfg.eval_split, kinds)


class Files:
    """Games of the split `train` for training seeds, of `held_out` for the others."""

    def __init__(self, env_id: str, data: str, held_out: str, kinds: Sequence[str]) -> None:
        self._env_id, self._kinds = env_id, tuple(kinds)
        self._root = Path(os.path.expandvars(data)).expanduser()
        self._splits = {"train": self._root / "train", "held out": self._root / held_out}
        for path in self._splits.values():
            if not path.is_dir():
                raise DataError(
                    f"no {path}: env.data is the folder with train, valid_seen and valid_unseen in it, as "
                    f"alfworld-download leaves it, such as $" + f"{HOME}/json_2.1.1"
                )

    def __call__(self, seed: int) -> Game:
        paths = self._held_out if held_out(seed) else self._train
        return read_game(paths[row(seed, self._env_id, len(paths))], self._root)

    @cached_property
    def _train(self) -> tuple[Path, ...]:
        return found(self._splits["train"], self._kinds)

    @cached_property
    def _held_out(self) -> tuple[Path, ...]:
        return found(self._splits["held out"], self._kinds)


@cache
def found(folder: Path, kinds: tuple[str, ...]) -> tuple[Path, ...]:
    """The games below a folder that ALFWorld plays: of these kinds, solvable, nothing sliced or moved about. The
    order is fixed by their names and mixes the kinds: a small panel is a fair one. DataError where there is none."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob(GAME)}
    known = [name for name in sorted(names, key=lambda name: stable_hash("order", name)) if not SKIPPED.search(name)]
    games = tuple(names[name] for name in known if read_task(names[name]).get("task_type") in kinds)
    games = tuple(path for path in games if solvable(path))
    if not games:
        raise DataError(f"no {GAME} of {', '.join(kinds)} below {folder}: fetch them by alfworld-download")
    return games
