"""The directory of one run: snapshot, seeds, metrics, checkpoints, resume, DONE. Knows stages and models by name alone.

    config.yaml  overrides              what was asked
    commit  versions                    of which code
    inputs.json                         what it read from outside: each file, and a hash of its content
    metrics.jsonl                       one object a line: step and metrics
    checkpoints/step_000012/            what the stage wrote, plus state.json
    summary.json  DONE                  the end

Everything is either replaced in one step or only ever appended to. A checkpoint remembers the last line of each
append-only file; resuming cuts them back to that, so a run that was killed leaves the same files as one that was not.
"""

import dataclasses
import io
import json
import logging
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import numpy as np
from PIL.Image import Image

from vlm_agents import checkpoints, stopping, tracking
from vlm_agents.checkpoints import Checkpoint
from vlm_agents.config import (
    CollectConfig,
    EvalConfig,
    RunConfig,
    command,
    conf_dir,
)
from vlm_agents.errors import ConfigError, DataError
from vlm_agents.files import append_line, atomic_write, cut_after, hold, last_lines, sweep_temporaries, sync, writing
from vlm_agents.inputs import INPUTS, hashes, inputs_of, refuse_other_inputs
from vlm_agents.lineage import differences, refuse_nonsense
from vlm_agents.progress import say
from vlm_agents.seeds import stable_hash
from vlm_agents.snapshot import as_yaml, refuse_other_settings
from vlm_agents.tracking import Tracker
from vlm_agents.versions import versions
from vlm_agents.weights import (
    RUN_MODEL,
    found_none,
    holds_work,
    weights_of,
)
from vlm_agents.world import ALONE, World

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LEASE = 120  # seconds that a Slurm job which is begun again waits for the lock of its earlier self


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Run:
    """One run directory, held by one process at a time. Made by `open`, a context manager.

    Of several ranks the first holds it and is alone in writing there. To the others `dir` is a folder of their own that
    is thrown away, so that nobody who writes has to ask who he is; checkpoints are of the one that all share.
    """

    def __init__(
        self,
        cfg: RunConfig,
        overrides: Sequence[str],
        lock: IO[bytes],
        sweep: Path | None,
        undo: ExitStack,
        resumed: bool,
        world: World,
        folder: Path,
    ) -> None:
        self.cfg, self.world = cfg, world
        self.dir = folder
        self._checkpoints = Path(cfg.run_dir) / "checkpoints"
        self.env = cfg.env.id  # of the record; a stage that plays none names that of its data
        self._overrides = overrides
        self._lock = lock
        self._sweep = sweep
        self._undo = undo  # what `open` made; until `begin`
        self._begun = False
        self._tracker: Tracker | None = None  # from `begin` on
        self.differences = differences(cfg)  # lines for a person: what it asks otherwise than its weights were taught
        self._append_only = [METRICS]
        self._artifacts: dict[str, str] = {}
        self._resumed = resumed  # something was done here before
        self._checkpoint: Checkpoint | None = None
        self._step = 0
        self._started = time.monotonic()
        self._seconds_before = 0.0

    @classmethod
    def open(cls, cfg: RunConfig, overrides: Sequence[str], sweep: Path | None = None, world: World = ALONE) -> Self:
        """Create or continue the run directory; ConfigError if it is finished, in use, or was of other settings or
        inputs."""
        refuse_nonsense(cfg)
        with ExitStack() as undo:
            folder = Path(cfg.run_dir)
            if not world.main:
                folder = Path(tempfile.mkdtemp(prefix=f"vlm_agents_rank{world.rank}_"))
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
            with writing(folder):
                make_folder(folder, undo)
                if any(folder.iterdir()) and not (folder / "lock").exists():
                    raise ConfigError(f"{folder} is no run directory, and not empty: choose another run_dir= or name=")
                lock = open(folder / "lock", "ab")  # noqa: SIM115 - closed by __exit__
            until = time.monotonic() + (LEASE if "SLURM_RESTART_COUNT" in os.environ else 0)
            while not hold(lock):
                if time.monotonic() >= until:
                    undo.pop_all()
                    raise ConfigError(f"{folder} is in use by another process: wait for it, or choose another name=")
                time.sleep(1)
            if (folder / "DONE").exists():
                raise ConfigError(f"{folder} is finished: choose another name=, or delete that directory")
            for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                sweep_temporaries(part)
            settings = as_yaml(cfg)
            if resumed := holds_work(folder):
                refuse_other_settings(folder / "config.yaml", settings)
                refuse_other_inputs(folder)
            else:
                (folder / INPUTS).unlink(missing_ok=True)
            if world.main and not (folder / INPUTS).exists():  # of an older version too
                atomic_write(folder / INPUTS, to_json(hashes(inputs_of(cfg)), indent=2) + "\n")
            atomic_write(folder / "config.yaml", settings)
            atomic_write(folder / "overrides", "".join(f"{word}\n" for word in overrides))
            if world.main:  # asking git and every package takes a while
                atomic_write(folder / "commit", commit() + "\n")
                atomic_write(folder / "versions", versions() + "\n")
            world.wait()  # nobody goes on before it is known to be free
            return cls(cfg, overrides, lock, sweep, undo.pop_all(), resumed, world, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self._tracker:
            self._tracker.close("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")
        if kind is not None or not self.world.main:
            self._undo.close()
        self._lock.close()

    def begin(self) -> None:
        """To be called by a stage once what it needs is there and loaded: from here on it does something, and tells the
        tracker. One that ends before leaves nothing behind. Another call, or the first `log` at the latest, does no
        more."""
        if self._begun:
            return
        self._begun = True
        if not self.world.main:
            return
        self._undo.pop_all()
        self._tracker = Tracker(dataclasses.asdict(self.cfg), self.dir, self._sweep)
        for line in [*self._whose(), *self.differences]:
            say(line)

    def _whose(self) -> list[str]:
        """Lines on the weights that it goes on with, which are its own where a checkpoint has some."""
        if self._checkpoint and (self._checkpoint.path / RUN_MODEL).is_dir():
            place = self._checkpoint.path.relative_to(self.dir)
            return [f"weights: {place} of this run, which began from {self.weights}"]
        whose = f"weights: {self.weights}" if self.weights else ""
        return list(filter(None, (whose, found_none(self.cfg, self._overrides))))

    @property
    def weights(self) -> str:
        """Whose weights this run starts from, or plays, for a person; empty where no model has a part in it."""
        return weights_of(self.cfg)

    def facts(self) -> dict[str, str]:
        """What a report's reader needs in order to know, and to repeat, what was run."""
        cfg = self.cfg
        facts = {"command": command(self._overrides), "env": self.env, "model": played_by(cfg)}
        facts |= {"weights": self.weights} if self.weights else {}
        facts |= {"differs": "; ".join(self.differences)} if self.differences else {}
        facts |= {"algo": cfg.algo.name} if cfg.algo else {}
        made = commit()
        facts |= {"seed": str(cfg.seed), "commit": made[:12] + made[40:]}  # with its +, where files were changed
        return facts | {"versions": ", ".join(versions().splitlines()), "time": f"{self._seconds():.0f} s"}

    def path(self, *parts: str) -> Path:
        return self.dir.joinpath(*parts)

    # ---- seeds ---------------------------------------------------------------------------------------------------
    def seed_for(self, *words: object) -> int:
        """A seed in [0, 2^32) for one purpose of this run, named by `words`."""
        return stable_hash("run", self.cfg.seed, *words) % 2**32

    def rng(self, *words: object) -> np.random.Generator:
        """The generator of that seed."""
        return np.random.default_rng(self.seed_for(*words))

    # ---- what the run tells ----------------------------------------------------------------------------------------
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl (non-finite numbers as null), and tell the tracker."""
        self.begin()
        self._step = step
        if self.world.main:
            append_line(self.dir / METRICS, to_json({"step": step, **metrics}))
        if self._tracker:
            self._tracker.metrics(step, metrics)

    def image(self, key: str, image: Image, step: int) -> None:
        """Keep a picture under pictures/, and show it in the tracker."""
        if not self.world.main:
            return
        path = self.path("pictures", f"{key.replace('/', '_')}_{step:06d}.png")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        atomic_write(path, buffer.getvalue(), durable=False)
        if self._tracker:
            self._tracker.image(key, path, step)

    def save_folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """Have `write` fill a folder of the run directory, which is there whole or not at all."""
        checkpoints.write_folder(self.path(name), write if self.world.main else lambda _: None)
        return self.path(name)

    def artifact(self, path: Path) -> None:
        """Name a file or folder of the run directory in summary.json, and copy a file to the tracker."""
        self._artifacts[path.stem] = str(path.relative_to(self.dir))
        if self._tracker:
            self._tracker.artifact(path)

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def append_only(self, *names: str) -> None:
        """Register files of the run directory that are only ever appended to: resuming will cut them back. Flush them
        before save_checkpoint."""
        self._append_only += [name for name in names if name not in self._append_only]

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], state: Mapping[str, Any], keep: int = 2, best: int | None = None
    ) -> Path:
        """Have `write` fill a folder, and keep it as the newest of `keep` checkpoints, beside that of step `best`.
        `state` must survive JSON.

        All ranks call it, and `write` on each may add files of its own."""
        for name in self._append_only:
            if self.path(name).exists():
                sync(self.path(name))
        offsets = {name: self._size(name) for name in self._append_only}
        marks = {name: last_lines(self.path(name), offset) for name, offset in offsets.items() if offset}
        record = {"state": state, "seconds": self._seconds(), "offsets": offsets, "last_lines": marks, "best": best}
        return checkpoints.save(self._checkpoints, step, write, record, keep, self.world)

    def latest_checkpoint(self, before: float = math.inf) -> Checkpoint | None:
        """The newest checkpoint, from before that step, that is whole; None if there never was one, DataError if all of
        them are damaged."""
        return self.world.of_main(lambda: checkpoints.latest(self._checkpoints, before))

    def has_checkpoint(self, step: int) -> bool:
        """Is there one of that step?"""
        return self.world.of_main(lambda: checkpoints.place_of(self._checkpoints, step).is_dir())

    def restore(self) -> Checkpoint | None:
        """Put the append-only files back to where the latest checkpoint saw them, and return it; None: from the start.

        Register the files first."""
        self._checkpoint = checkpoint = self.latest_checkpoint()
        if self._resumed and not checkpoint and self.cfg.stage.name != "collect":  # which goes on with its episodes
            say(f"{self.cfg.stage.name} was interrupted before anything was kept of it: begins anew")
        offsets = {} if checkpoint is None else checkpoint.offsets
        self._seconds_before = 0.0 if checkpoint is None else checkpoint.seconds
        for name in self._append_only:
            marks = checkpoint.last_lines.get(name, []) if checkpoint else []
            if (
                self.world.main
                and self.path(name).exists()
                and not cut_after(self.path(name), offsets.get(name, 0), marks)
            ):
                log.warning("%s lost lines that its checkpoint saw: going on with those that are left", self.path(name))
        if checkpoint and checkpoint.keep:  # it may have been killed before it removed those that it replaced
            keep = checkpoint.step, checkpoint.keep, checkpoint.best
            self.world.of_main(lambda: checkpoints.prune(self._checkpoints, *keep))
        return checkpoint

    def asked_to_stop(self) -> bool:
        """Was any rank asked to? Then save, and `stop`."""
        return self.world.any(stopping.asked())

    def stop(self) -> NoReturn:
        """End the run as it was asked to, by Stopped."""
        say("stopped as it was asked to")
        raise stopping.Stopped

    def _size(self, name: str) -> int:
        return self.path(name).stat().st_size if self.path(name).exists() else 0

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    # ---- the end ---------------------------------------------------------------------------------------------------
    def finish(self, metrics: Mapping[str, float], artifacts: Mapping[str, Path] | None = None) -> dict[str, float]:
        """Write summary.json and DONE. Returns the metrics, so that a stage can end with `return run.finish(...)`."""
        for key, path in (artifacts or {}).items():
            self._artifacts[key] = str(path.relative_to(self.dir))
        cfg = self.cfg
        summary = {
            "stage": cfg.stage.name,
            "env": self.env,
            "model": played_by(cfg),
            "weights": self.weights or None,
            "differs": self.differences,
            "algo": None if cfg.algo is None else cfg.algo.name,
            "seed": cfg.seed,
            "metrics": dict(metrics),
            "artifacts": self._artifacts,
            "wall_seconds": round(self._seconds(), 3),
        }
        atomic_write(self.path("summary.json"), to_json(summary, indent=2) + "\n")
        if self._tracker:
            self._tracker.finished(self._step, metrics)
        atomic_write(self.path("DONE"), "")
        return dict(metrics)


def make_folder(folder: Path, undo: ExitStack) -> None:
    """Make it with its parents; `undo` shall remove what was made here, and all that comes into it if it was empty."""
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
            else:  # else another process was faster, and it is that one's
                undo.callback(remove_empty, path)
    folder.mkdir(exist_ok=True)
    if not any(folder.iterdir()):
        undo.callback(clear, folder)


def remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody else has put something into it
        folder.rmdir()


def clear(folder: Path) -> None:
    """Remove all that is in the folder."""
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def finished_metrics(cfg: RunConfig) -> dict[str, float] | None:
    """Metrics of the run of `cfg` if it is finished already; ConfigError if that was of other settings or inputs."""
    folder = Path(cfg.run_dir)
    with writing(folder):  # a name that no file system takes
        if not (folder / "DONE").exists():
            return None
    refuse_other_settings(folder / "config.yaml", as_yaml(cfg))
    refuse_other_inputs(folder)
    try:
        metrics = dict(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'summary.json'} is unreadable: delete {folder / 'DONE'}, and the same command writes it anew"
        ) from error
    if (folder / "unsent").exists() and cfg.tracking.name != "jsonl":
        with suppress(DataError):  # in use: the process that was there before is sending it
            tracking.send(folder, dataclasses.asdict(cfg.tracking))
    return metrics


def played_by(cfg: RunConfig) -> str:
    """The model, or the name of the scripted policy that had its place."""
    match cfg.stage:
        case CollectConfig(policy="remote", remote=remote) | EvalConfig(policy="remote", remote=remote):
            return remote.model
        case CollectConfig(policy=policy) | EvalConfig(policy=policy) if policy != "model":
            return policy
    return cfg.model.name


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and the infinities become null, NumPy scalars plain numbers."""

    def plain(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): plain(child) for key, child in node.items()}
        if isinstance(node, np.generic):
            node = node.item()
        return None if isinstance(node, float) and not math.isfinite(node) else node

    return json.dumps(plain(value), indent=indent, allow_nan=False)


@cache
def commit() -> str:
    """Commit of the checkout that this code runs from, with + if files were changed; empty for an installed wheel."""
    root = conf_dir().parent
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
