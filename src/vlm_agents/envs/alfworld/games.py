"""Where ALFWorld's games come from: made here, or from ALFWorld's files. A seed decides which one is played."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path

from vlm_agents.config import AlfWorldConfig
from vlm_agents.envs.alfworld.game import Game, marked, read_game
from vlm_agents.envs.alfworld.generator import generate
from vlm_agents.envs.alfworld.goals import KINDS
from vlm_agents.errors import DataError
from vlm_agents.seeds import held_out, row, stable_hash

logger = logging.getLogger(__name__)

GAME = "game.tw-pddl"
USUAL = "$ALFWORLD_DATA/json_2.1.1, or ~/.cache/alfworld/json_2.1.1 where that isn't set"
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
        if "$" in str(self._root):
            raise DataError(
                f"env.data={data}: that variable isn't set. Where alfworld-download put its files is {USUAL}"
            )
        for path in self._splits.values():
            if next(files(path), None) is None:
                raise DataError(
                    f"no {GAME} below {path}: env.data is the folder with train, valid_seen and valid_unseen in it, as "
                    f"alfworld-download leaves it, such as {USUAL}"
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


def files(folder: Path) -> Iterator[Path]:
    """All files of games below a folder, in links to folders too."""
    seen = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to what is above it
            folders.clear()
        elif GAME in names:
            yield Path(place, GAME)
        seen.add(real)


@cache
def found(folder: Path, kinds: tuple[str, ...]) -> tuple[Path, ...]:
    """The games below a folder that ALFWorld plays: of these kinds, solvable, nothing sliced or moved about. The
    order is fixed by their names and mixes the kinds: a small panel is a fair one. DataError where there is none."""
    names = {path.relative_to(folder).as_posix(): path for path in files(folder)}
    known = {name: marked(names[name]) for name in names if not SKIPPED.search(name)}
    if broken := sorted(name for name, mark in known.items() if mark is None):
        logger.warning(
            "%d of %d games below %s can't be read and aren't played, %s first: fetch them again",
            *(len(broken), len(known), folder, broken[0]),
        )
    wanted = [name for name, mark in known.items() if mark and mark.solvable and mark.kind in kinds]
    games = tuple(names[name] for name in sorted(wanted, key=lambda name: stable_hash("order", name)))
    if not games:
        raise DataError(f"no {GAME} of {', '.join(kinds)} below {folder}: fetch them by alfworld-download")
    return games
