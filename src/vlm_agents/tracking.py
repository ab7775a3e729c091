"""A copy beside metrics.jsonl, in MLflow, TensorBoard or Weights & Biases, that a thread of its own makes: no server,
lock or disk holds up a run. What each of them needs stands in backends.py.

What can't be sent now is sent later: while the run lasts, when it is continued or its command is given again, and by

    python -m vlm_agents.tracking <run directory>...
"""

import json
import logging
import math
import os
import shlex
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import yaml

from vlm_agents import backends, stores
from vlm_agents.backends import Backend, Point
from vlm_agents.errors import DataError, harmless
from vlm_agents.files import hold
from vlm_agents.stores import masked

log = logging.getLogger(__name__)

PATIENCE = stores.PATIENCE  # seconds that a run waits for the copy when it starts, and twice that at its end
LONGEST = 60  # seconds that it waits at its end while one thing after another is taken
PAUSES = 1, 300  # seconds between two tries, which double from the one to the other
POINTS_PER_CALL = 500  # MLflow takes 1000
SHOWN = "*.html", "*.gif", "summary.json"  # what is copied of a finished run, beside config.yaml; never its weights
UNSENT = "unsent"  # this file lies in a run directory while its copy lacks something


class Tracker:
    """The copy of one run directory; nothing with tracking=jsonl. No call raises; making it may wait for PATIENCE, and
    its end for LONGEST, and no other call waits."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> None:
        """`settings` are a RunConfig's, as nested dictionaries; `sweep` is the folder of the sweep, where it is one."""
        self._folder = folder
        self._points: deque[Point] = deque()  # what waits to be sent; the thread alone takes out
        self._files: deque[tuple[Path, str, int]] = deque()  # with a key and a step: a picture
        self._read_back = False  # was metrics.jsonl?
        self._connected = False
        self._status = ""
        self._stuck = False
        self._heard = 0.0  # when it last took something
        self._complaints: set[str] = set()
        self._tried, self._news, self._closing = Event(), Event(), Event()
        self._thread: Thread | None = None
        self.title = ""
        self.sent = {"points": 0, "files": 0}
        if settings["tracking"]["name"] != "jsonl" and (backend := self._made(settings, sweep)):
            self._backend, self.title = backend, backend.title
            self.artifact(folder / "config.yaml")
            with suppress(OSError):
                (folder / UNSENT).touch()
            self._thread = Thread(target=self._follow, name="tracker", daemon=True)
            self._thread.start()
            self._tried.wait(PATIENCE)

    def _made(self, settings: Mapping[str, Any], sweep: Path | None) -> Backend | None:
        """Its package is imported here, before there is the thread: two that import can trip each other up."""
        try:
            return backends.make(settings, self._folder, sweep)
        except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the run
            self._complain(f"tracking={settings['tracking']['name']} is off, metrics.jsonl goes on", error)
            return None

    # ---- what the run tells ----------------------------------------------------------------------------------------
    def metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """To be called once metrics.jsonl has them. The first call sends what earlier processes left there, too."""
        if self._thread is not None:
            if not self._read_back:
                self._points.extend(points_in(self._folder / "metrics.jsonl"))
                self._read_back = True
            self._points.extend(points_of(step, metrics))
            self._news.set()

    def image(self, key: str, path: Path, step: int) -> None:
        self._add(path, key, step)

    def artifact(self, path: Path) -> None:
        self._add(path)

    def finished(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """To be called once summary.json is there: the run's last metrics, and the files that show what came of it."""
        self.metrics(step, metrics)
        for pattern in SHOWN:
            for path in sorted(self._folder.glob(pattern)):
                self.artifact(path)

    def _add(self, path: Path, key: str = "", step: int = 0) -> None:
        self._files.append((path, key, step))
        self._news.set()

    def close(self, status: str) -> bool:
        """End the copy as FINISHED, FAILED or KILLED. False, and a line of advice, where it lacks something."""
        if self._thread is None:
            return True
        self._status = status
        self._closing.set()
        self._news.set()
        start = self._heard = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < min(self._heard + 2 * PATIENCE, start + LONGEST):
            self._thread.join(0.1)
        complete = not (self._thread.is_alive() or self._stuck or self._points)
        if complete:
            (self._folder / UNSENT).unlink(missing_ok=True)
        else:
            command = f"python -m vlm_agents.tracking {shlex.quote(os.path.relpath(self._folder))} sends it"
            later = command if (self._folder / "DONE").exists() else "the run sends it when it is continued"
            log.warning("%s lacks a part of this run; once %s works again, %s", self.title, self.title, later)
        return complete

    # ---- the thread ------------------------------------------------------------------------------------------------
    def _follow(self) -> None:
        pause = PAUSES[0]
        while True:
            last = self._closing.is_set()
            try:
                self._send(last)
                self._stuck, pause = False, PAUSES[0]
            except Exception as error:  # noqa: BLE001 - as above
                if not self._stuck:
                    self._complain(
                        f"{self.title} takes nothing for now and is tried again; metrics.jsonl goes on", error
                    )
                self._stuck = True
            self._tried.set()
            if last:
                return
            if self._stuck:
                self._closing.wait(pause)
                pause = min(2 * pause, PAUSES[1])
            else:
                self._news.wait()
                self._news.clear()

    def _send(self, last: bool) -> None:
        """Send all that waits, the points first: trouble with files mustn't hold them up."""
        if not self._connected:
            self._backend.connect()
            self._connected = True
        while self._points:
            batch = [self._points[index] for index in range(min(len(self._points), POINTS_PER_CALL))]
            self._log(batch)
            for _ in batch:
                self._points.popleft()
            self._took("points", len(batch))
        if last:
            self._backend.end(self._status)
        while self._files:
            self._send_file(*self._files[0])
            self._files.popleft()
            self._took("files", 1)
        if last:
            self._backend.close()

    def _took(self, kind: str, count: int) -> None:
        self.sent[kind] += count
        self._heard = time.monotonic()

    def _send_file(self, path: Path, key: str, step: int) -> None:
        try:
            self._backend.file(path, key, step)
        except Exception as error:
            if not self._backend.refuses(error):
                raise
            self._complain(f"{self.title} refuses {path.name}, and does without it", error)

    def _log(self, points: Sequence[Point]) -> None:
        """All of them in one call; where that is refused, each in its own, so that one doesn't spoil the rest."""
        try:
            self._backend.log(points)
        except Exception as error:
            if not self._backend.refuses(error):
                raise
            if len(points) == 1:
                self._complain(f"{self.title} refuses {points[0].key}, and does without it", error)
            else:
                for point in points:
                    self._log([point])

    def _complain(self, text: str, error: Exception) -> None:
        reason = masked(str(error).strip().split("\n", 1)[0] or type(error).__name__)
        if reason not in self._complaints:
            self._complaints.add(reason)
            log.warning("%s", harmless(f"{text} ({reason})"))


def points_of(step: int, metrics: Mapping[str, float | None]) -> list[Point]:
    now = int(time.time() * 1000)
    return [Point(key, math.nan if value is None else float(value), now, step) for key, value in metrics.items()]


def points_in(path: Path) -> list[Point]:
    """What metrics.jsonl holds, in its order, NaN for null; a line that somebody damaged is left out with a warning."""
    points: list[Point] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            metrics = json.loads(line)
            points += points_of(int(metrics.pop("step")), metrics)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            log.warning('%s, line %d is not {"step": ..., metrics}: left out', path, number)
    return points


def send(folder: Path, tracking: Mapping[str, Any] | None = None) -> str:
    """Send what a run's copy lacks, whatever the run's tracking was: MLflow's, where it was jsonl. What was sent, in a
    line; empty where something still lacks.

    A run that was killed ends there as KILLED until it is continued. DataError while a process holds the run."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["tracking"] |= tracking or {}
        if settings["tracking"]["name"] == "jsonl":
            settings["tracking"]["name"] = "mlflow"
        finished = (folder / "DONE").exists()
        metrics = json.loads((folder / "summary.json").read_text())["metrics"] if finished else {}
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{folder} holds no run, or its config.yaml or summary.json is damaged") from error
    with held(folder):
        tracker = Tracker(settings, folder, sweep_of(folder))
        last = max((point.step for point in points_in(folder / "metrics.jsonl")), default=0)
        tracker.finished(last, metrics)
        complete = tracker.close("FINISHED" if finished else "KILLED")
    if not complete:
        return ""
    counts = f"{tracker.sent['points']} points, {tracker.sent['files']} files"
    return (
        f"metrics and files are all in {tracker.title} now ({counts} sent), as {'finished' if finished else 'killed'}"
    )


def begin_sweep(settings: Mapping[str, Any], sweep: Path) -> None:
    """Before the jobs of a sweep begin side by side, make in MLflow what they share: the store, the experiment and the
    sweep's run. `settings` are those of a job."""
    if settings["tracking"]["name"] != "mlflow":
        return
    try:
        backends.Mlflow(settings, sweep, None).begin_sweep(sweep)
    except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the sweep
        log.warning("%s", harmless(masked(f"MLflow doesn't know of {sweep} yet, its jobs will tell: {error}")))


def end_sweep(sweep: Path, status: str, settings: Mapping[str, Any] | None = None) -> None:
    """End the MLflow run of a sweep as FINISHED or FAILED, as its jobs came out this time: of one that was refused
    before it began, no job's run knows. `settings` are those of a job, where none has written them down."""
    try:
        known = settings or yaml.safe_load(next(sweep.rglob("config.yaml")).read_text())
        stores.quieten()
        stores.end_run(stores.address(known["tracking"]), (sweep / "mlflow_run_id").read_text(), status)
    except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the sweep
        log.warning("%s", harmless(masked(f"MLflow doesn't know that {sweep} is {status}: {error}")))


def tell_sweep(sweep: Path, metrics: Mapping[str, float], files: Sequence[Path]) -> str:
    """Add what came of a sweep's comparison to its MLflow run. Says, in a line, whether it is there now."""
    note = sweep / "mlflow_run_id"
    if not note.exists():
        return f"not in MLflow: {sweep} has no run there (tracking=mlflow makes one)"
    try:
        settings = yaml.safe_load(next(sweep.rglob("config.yaml")).read_text())
        stores.quieten()
        stores.add_to_run(stores.address(settings["tracking"]), note.read_text(), metrics, files)
    except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the comparison
        return masked(f"not in MLflow: {sweep}: {str(error).strip().splitlines()[0] if str(error) else error!r}")
    return f"in MLflow: the ranking and the files are in the run of {sweep}"


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that the run is a job of."""
    return folder.parent if (folder.parent / "multirun.yaml").exists() else None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from the run in the meantime."""
    with open(folder / "lock", "ab") as file:
        if not hold(file):
            raise DataError(f"{folder} is in use by another process, which sends what it has to send itself")
        yield


def main(folders: Sequence[str]) -> int:
    """Send what the copies of runs lack, and have the default store find its files where they are now. The exit
    status."""
    with suppress(sqlite3.Error):
        stores.settle(Path("mlflow.db").absolute())
    if not folders:
        with suppress(sqlite3.Error):
            for name, page in stores.pages(Path("mlflow.db").absolute()):
                print(f"runs of {harmless(name)}: http://127.0.0.1:5000/{page}", flush=True)
    status = 0
    for folder in folders:
        try:
            sent = send(Path(folder))
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        if sent:
            print(f"{folder}: {sent}", flush=True)
        else:
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
