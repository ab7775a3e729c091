"""MLflow beside metrics.jsonl. The only file that knows MLflow, and it imports it only when chosen.

Tracking is a convenience: the first failure is told once, then the tracker is off and the run goes on.
"""

import dataclasses
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlm_agents.config import RunConfig, flat

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
PARAMS_PER_CALL = 100  # MLflow's limits
PARAM_LENGTH = 500


class Tracker:
    """One MLflow run, or nothing: with tracking=jsonl and after a failure every call is without effect."""

    def __init__(self, cfg: RunConfig, settings: str, sweep: Path | None) -> None:
        self._client: Any = None
        self._run_id = ""
        self._goes_on = False
        self._told: dict[str, set[int]] = {}  # the steps at which MLflow has a metric
        if cfg.tracking.name == "mlflow":
            try:
                self._start(cfg, settings, sweep)
            except Exception as error:  # noqa: BLE001 - whatever ails the tracker must not stop the run
                self._give_up(error)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """All of them in one call, at one step; but for those that MLflow has, as a resumed run repeats some steps."""
        if self._client is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            new = {key: value for key, value in metrics.items() if step not in self._steps_of(key)}
            self._call("log_batch", metrics=[Metric(key, float(value), now, step) for key, value in new.items()])
            for key in new:
                self._told[key].add(step)

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._told:
            history = self._call("get_metric_history", key) if self._goes_on else None
            self._told[key] = {point.step for point in history or ()}
        return self._told[key]

    def image(self, key: str, image: Image, step: int) -> None:
        self._call("log_image", image, key=key, step=step)

    def artifact(self, path: Path) -> None:
        self._call("log_artifacts" if path.is_dir() else "log_artifact", str(path))

    def close(self, status: str) -> None:
        """End the MLflow run as FINISHED, FAILED or KILLED."""
        self._call("set_terminated", status)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._client is not None:
            try:
                return getattr(self._client, method)(self._run_id, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - as above
                self._give_up(error)
        return None

    def _give_up(self, error: Exception) -> None:
        self._client = None
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        log.warning("MLflow is off for the rest of this run (%s); metrics.jsonl goes on", reason)

    def _start(self, cfg: RunConfig, settings: str, sweep: Path | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for chatty in ("mlflow", "alembic"):  # tales of database migrations
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri = cfg.tracking.uri or f"{SQLITE}{Path.cwd() / 'mlflow.db'}"
        tags = {"stage": cfg.stage.name, "env": cfg.env.id, "model": cfg.model.name}
        if cfg.algo is not None:
            tags["algo"] = cfg.algo.name
        with exclusive(uri, sweep):
            client = MlflowClient(tracking_uri=uri)
            experiment = experiment_id(client, uri, cfg.tracking.experiment)
            if sweep is not None:
                parent, _ = open_run(client, experiment, sweep, f"{cfg.name}/{cfg.stage.name}", tags)
                tags["mlflow.parentRunId"] = parent
        name = f"{cfg.name}/{cfg.stage.name}" + (f"/{Path(cfg.run_dir).name}" if sweep else "")
        self._run_id, fresh = open_run(client, experiment, Path(cfg.run_dir), name, tags)
        self._client = client
        self._goes_on = not fresh
        if fresh:
            self._describe(cfg, settings)

    def _describe(self, cfg: RunConfig, settings: str) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in flat(dataclasses.asdict(cfg))]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._call("log_batch", params=params[start : start + PARAMS_PER_CALL])
        self._call("log_text", settings, "config.yaml")


@contextmanager
def exclusive(uri: str, sweep: Path | None) -> Iterator[None]:
    """One process at a time sets up a store: two that create one sqlite file break each other's migrations."""
    database = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
    path = database.with_name(f"{database.name}.lock") if database else sweep and sweep / "lock"
    if database and not database.exists():
        print(f"making {database} for MLflow, once", flush=True)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Id of the experiment, made when missing; pictures and files of a sqlite store live beside its database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    artifacts = Path(uri.removeprefix(SQLITE)).parent / "mlruns" if uri.startswith(SQLITE) else None
    try:
        return client.create_experiment(name, artifact_location=artifacts and artifacts.as_uri())
    except MlflowException:  # another process was faster, on a server
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def open_run(client: Any, experiment: str, folder: Path, name: str, tags: Mapping[str, str]) -> tuple[str, bool]:
    """Id of the MLflow run that belongs to `folder`, and whether it is new. The folder's mlflow_run_id remembers it."""
    from mlflow.exceptions import MlflowException

    note = folder / "mlflow_run_id"
    if note.exists():
        try:
            client.update_run(note.read_text(), status="RUNNING")
            return note.read_text(), False
        except MlflowException as error:
            log.warning("this run is not in MLflow's store any more, a new one is begun there: %s", error)
    run_id = client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
    note.write_text(run_id)
    return run_id, True
