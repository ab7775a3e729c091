"""MLflow beside metrics.jsonl: a copy that a thread of its own makes, so that no server, lock or disk holds up a run.

What can't be sent now is sent later: while the run lasts, when it is continued, and once it is finished by

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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import yaml
from PIL import Image

from vlm_agents import stores
from vlm_agents.errors import DataError, harmless
from vlm_agents.stores import masked, refused

log = logging.getLogger(__name__)

PATIENCE = stores.PATIENCE  # seconds that a run waits for MLflow when it starts, and twice that at its end
LONGEST = 60  # seconds that it waits at its end while MLflow takes one thing after another
PAUSES = 1, 300  # seconds between two tries, which double from the one to the other
METRICS_PER_CALL = 500  # MLflow takes 1000
QUIET = {  # unless the environment says otherwise: it is we who try again, and no address is printed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Point(NamedTuple):
    """One number of a curve. Its time stays the same however often it is sent: MLflow knows it again."""

    key: str
    value: float
    time: int  # milliseconds
    step: int


class Tracker:
    """One MLflow run that follows a run directory; nothing with tracking=jsonl. No call raises; making it may wait for
    PATIENCE, and its end for LONGEST, and no other call waits."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, sweep: Path | None) -> None:
        """`settings` are a RunConfig's, as nested dictionaries; `sweep` is the folder of the sweep, where it is one."""
        self._settings, self._folder, self._sweep = settings, folder, sweep
        self._points: deque[Point] = deque()  # what waits to be sent; the thread alone takes out
        self._files: deque[tuple[Path, str, int]] = deque()  # with a key and a step: a picture
        self._read_back = False  # was metrics.jsonl?
        self._steps: dict[str, set[int]] = {}  # at which MLflow has a metric
        self._client: Any = None
        self._run_id = ""
        self._goes_on = False
        self._status = ""
        self._stuck = False
        self._heard = 0.0  # when MLflow last took something
        self._complaints: set[str] = set()
        self._tried, self._news, self._closing = Event(), Event(), Event()
        self._thread: Thread | None = None
        if settings["tracking"]["name"] == "mlflow" and self._importable():
            self._uri, self._experiment = self._where()
            self._thread = Thread(target=self._follow, name="mlflow", daemon=True)
            self._thread.start()
            self._tried.wait(PATIENCE)

    def _importable(self) -> bool:
        """Import MLflow, which takes seconds, before there is the thread: two that import can trip each other up."""
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        try:
            import mlflow  # noqa: F401
        except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the run
            self._complain("MLflow is off, metrics.jsonl goes on", error)
            return False
        for chatty in ("mlflow", "alembic"):  # tales of migrations, and tracebacks of what is told here in a line
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        return True

    def _where(self) -> tuple[str, str]:
        """Address of the store and name of the experiment: as set, or as MLflow's own environment variables have it."""
        uri, experiment = (self._settings["tracking"][name] for name in ("uri", "experiment"))
        if not uri and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
            print(f"MLflow: {harmless(masked(uri))}, which MLFLOW_TRACKING_URI names", flush=True)
        return uri or stores.DEFAULT, experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "vlm_agents"

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

    def _add(self, path: Path, key: str = "", step: int = 0) -> None:
        if self._thread is not None:
            self._files.append((path, key, step))
            self._news.set()

    def close(self, status: str) -> bool:
        """End the MLflow run as FINISHED, FAILED or KILLED. False, and a line of advice, where it lacks something."""
        if self._thread is None:
            return True
        self._status = status
        self._closing.set()
        self._news.set()
        start = self._heard = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < min(self._heard + 2 * PATIENCE, start + LONGEST):
            self._thread.join(0.1)
        complete = not (self._thread.is_alive() or self._stuck or self._points)
        if not complete:
            command = f"python -m vlm_agents.tracking {shlex.quote(os.path.relpath(self._folder))} sends it"
            later = command if (self._folder / "DONE").exists() else "the run sends it when it is continued"
            log.warning("MLflow lacks a part of this run; once MLflow works again, %s", later)
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
                    self._complain("MLflow takes nothing for now and is tried again; metrics.jsonl goes on", error)
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
        if self._client is None:
            where = self._uri, self._experiment, self._folder, self._sweep
            self._client, self._run_id, self._goes_on, settings_known = stores.connect(*where, self._settings)
            if not settings_known:
                self._files.appendleft((self._folder / "config.yaml", "", 0))
        while self._points:
            batch = [self._points[index] for index in range(min(len(self._points), METRICS_PER_CALL))]
            new = {(point.key, point.step): point for point in batch if point.step not in self._steps_of(point.key)}
            self._log(list(new.values()))
            for key, step in new:
                self._steps[key].add(step)
            for _ in batch:
                self._points.popleft()
            self._heard = time.monotonic()
        if last:
            self._client.set_terminated(self._run_id, self._status)
        while self._files:
            self._send_file(*self._files[0])
            self._files.popleft()
            self._heard = time.monotonic()

    def _send_file(self, path: Path, key: str, step: int) -> None:
        try:
            if key:
                with Image.open(path) as image:
                    self._client.log_image(self._run_id, image, key=key, step=step)
            else:
                self._client.log_artifact(self._run_id, str(path))
        except Exception as error:
            if not refused(error):
                raise
            self._complain(f"MLflow refuses {path.name}, and does without it", error)

    def _log(self, points: Sequence[Point]) -> None:
        """All of them in one call; where that is refused, each in its own, so that one doesn't spoil the rest."""
        from mlflow.entities import Metric

        try:
            if points:
                self._client.log_batch(self._run_id, metrics=[Metric(*point) for point in points])
        except Exception as error:
            if not refused(error):
                raise
            if len(points) == 1:
                self._complain(f"MLflow refuses {points[0].key}, and does without it", error)
            else:
                for point in points:
                    self._log([point])

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id, key) if self._goes_on else ()
            self._steps[key] = {point.step for point in history}
        return self._steps[key]

    def _complain(self, text: str, error: Exception) -> None:
        reason = masked(str(error).strip().split("\n", 1)[0] or type(error).__name__)
        if reason not in self._complaints:
            self._complaints.add(reason)
            log.warning("%s", harmless(f"{text} ({reason})"))


def points_of(step: int, metrics: Mapping[str, float | None]) -> list[Point]:
    now = int(time.time() * 1000)
    return [Point(key, math.nan if value is None else float(value), now, step) for key, value in metrics.items()]


def points_in(path: Path) -> list[Point]:
    """What metrics.jsonl holds; a damaged line is left out."""
    points: list[Point] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, AttributeError, KeyError):
            metrics = json.loads(line)
            points += points_of(int(metrics.pop("step")), metrics)
    return points


def send(folder: Path) -> bool:
    """Send MLflow what it lacks of a finished run, whatever the run's tracking was. Whether it has everything now."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        settings["tracking"]["name"] = "mlflow"
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{folder} holds no finished run; one that isn't is continued by its name=") from error
    tracker = Tracker(settings, folder, None)
    last = max((point.step for point in points_in(folder / "metrics.jsonl")), default=0)
    tracker.metrics(last, summary["metrics"])
    tracker.artifact(folder / "summary.json")
    return tracker.close("FINISHED")


def main(folders: Sequence[str]) -> int:
    """Send finished runs, and have the default store find its files where they are now. The exit status."""
    with suppress(sqlite3.Error):
        stores.settle(Path("mlflow.db").absolute())
    try:
        return 0 if all(send(Path(folder)) for folder in folders) else 1
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
