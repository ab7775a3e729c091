"""MLflow's store: where it lies, that it is whole, what its errors mean, the experiment and the run in it.

Knows no metrics. Raises whatever MLflow, SQLAlchemy and the file system raise: the tracker asks again later.
"""

import getpass
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlm_agents.config import flat
from vlm_agents.files import atomic_write, hold

log = logging.getLogger(__name__)

DEFAULT = "sqlite:///mlflow.db"  # relative, so that no folder's name needs escapes
PATIENCE = 10  # seconds for an answer or a lock
PARAMS_PER_CALL = 100  # MLflow's limits
PARAM_LENGTH = 500
FILES = """SELECT DISTINCT artifact_location FROM experiments
    WHERE artifact_location LIKE 'file:%' OR artifact_location LIKE '/%'"""
SHOWN = """SELECT experiment_id, name FROM experiments
    WHERE lifecycle_stage = 'active' AND experiment_id IN (SELECT experiment_id FROM runs)"""
PARENT = "mlflow.parentRunId"
TOKEN = "mlflow.vlm_agents.token"  # a tag that the UI hides: a run that was made, its answer lost, is known by it
OF_ONE_JOB = {"run_dir", "weights", "command"}  # tags that a sweep's run has none of
OF_THE_PLACE = "run_dir", "tracking."  # settings that say nothing of what a run does
QUIET = {  # unless the environment says otherwise: it is we who try again, and no address is printed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quieten() -> None:
    """Import MLflow, which takes seconds, with its tales switched off."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    import mlflow  # noqa: F401

    for chatty in ("mlflow", "alembic"):  # tales of migrations, and tracebacks of what is told here in a line
        logging.getLogger(chatty).setLevel(logging.CRITICAL)


def connect(
    uri: str,
    experiment: str,
    folder: Path,
    sweep: Path | None,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    began: int,
) -> tuple[Any, str, bool]:
    """Find or make all that the run in `folder` needs, which may fail anywhere and be done again: a client, the id of
    its MLflow run, and whether that was there before. It `began` at that time, in milliseconds."""
    from mlflow.entities import Param, RunTag

    name = name_of(settings)
    with opened(uri, sweep) as client:
        experiment_id = open_experiment(client, uri, experiment)
        if sweep is not None:
            tags = {**tags, PARENT: open_sweep(client, experiment_id, sweep, name, tags, began)}
            name += f"/{folder.name}"
    run_id, was_there = open_run(client, experiment_id, folder, name, tags, began)
    told = client.get_run(run_id).data
    params = [
        Param(key, str(value)[:PARAM_LENGTH])
        for key, value in flat(settings)
        if key not in told.params and not key.startswith(OF_THE_PLACE)
    ]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])
    if was_there:  # continued, maybe by another commit or with other words
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items() if told.tags.get(tag[0]) != tag[1]])
    return client, run_id, was_there


def name_of(settings: Mapping[str, Any]) -> str:
    return f"{settings['name']}/{settings['stage']['name']}"


def begin_sweep(uri: str, experiment: str, sweep: Path, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Make all that the jobs of a sweep have in common, before they begin on machines that share no lock."""
    with opened(uri, sweep) as client:
        experiment_id = open_experiment(client, uri, experiment)
        open_sweep(client, experiment_id, sweep, name_of(settings), tags, int(time.time() * 1000))


def open_sweep(client: Any, experiment: str, sweep: Path, name: str, tags: Mapping[str, str], began: int) -> str:
    """Id of the sweep's run, which `sweep` remembers. `tags` are those of a job, or of all."""
    shared = {key: value for key, value in tags.items() if key not in OF_ONE_JOB}
    return open_run(client, experiment, sweep, name, {**shared, "sweep": "true"}, began)[0]


def address(tracking: Mapping[str, Any]) -> str:
    """Where the settings, or the environment, say that the store is."""
    return tracking["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT


def end_run(uri: str, run_id: str, status: str) -> None:
    """End a run, unless it has ended so."""
    with opened(uri, None) as client:
        if client.get_run(run_id).info.status != status:
            client.set_terminated(run_id, status)


def add_to_run(uri: str, run_id: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
    """Add metrics and files to a run, ended or not."""
    with opened(uri, None) as client:
        client.get_run(run_id)  # gone: nothing is sent
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        for path in files:
            client.log_artifact(run_id, str(path))


def end_parent(client: Any, uri: str, run_id: str, sweep: Path) -> None:
    """End the sweep's run that a job's run belongs to, once none of its jobs goes on: the last to end does it. A job
    that comes later has it run again. Runs whose directory is no longer in `sweep` don't count."""
    from mlflow.entities import RunStatus

    run = client.get_run(run_id)
    parent = run.data.tags.get(PARENT)
    if parent is None:
        return
    with opened(uri, None):  # as the jobs of one sweep may end at the same time
        jobs: list[Any] = []
        token = ""
        while token is not None:
            words = f"tags.`{PARENT}` = '{parent}'"
            page = client.search_runs([run.info.experiment_id], words, page_token=token or None)
            jobs += page
            token = page.token or None
        there = {note.read_text() for note in sweep.rglob("mlflow_run_id")}
        jobs = [job for job in jobs if job.info.run_id in there]
        ends = {job.info.status for job in jobs}
        if all(RunStatus.is_terminated(RunStatus.from_string(end)) for end in ends):
            end = next((end for end in ("FAILED", "KILLED") if end in ends), "FINISHED")
            client.set_terminated(parent, end, end_time=max(job.info.end_time or 0 for job in jobs) or None)


def times_of(folder: Path) -> tuple[int, int | None]:
    """When the run began and, where it has come to its end, ended, in milliseconds."""
    try:
        seconds = float(json.loads((folder / "summary.json").read_text())["wall_seconds"])
        ended = (folder / "DONE").stat().st_mtime
    except (OSError, ValueError, LookupError, TypeError):
        return int(time.time() * 1000), None
    return int((ended - seconds) * 1000), int(ended * 1000)


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return ""


def database_of(uri: str) -> Path | None:
    """The file of a sqlite store, as SQLAlchemy reads the address; None for any other store."""
    from sqlalchemy import make_url

    name = make_url(uri).database if uri.startswith("sqlite") else None
    return None if not name or name.startswith((":", "file:")) else Path(name).absolute()


@contextmanager
def opened(uri: str, sweep: Path | None) -> Iterator[Any]:
    """A client of the store, which is made when it is a missing sqlite file. One process at a time sets up a store: two
    that create one database break each other's migrations, and two jobs would each make their sweep's parent run."""
    from mlflow import MlflowClient

    database = database_of(uri)
    lock = database.with_name(f"{database.name}.lock") if database else sweep and sweep / "lock"
    with exclusive(lock) if lock else nullcontext():
        if database:
            make(database)
            settle(database)
        yield MlflowClient(tracking_uri=uri)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock; TimeoutError when another process keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        deadline = time.monotonic() + PATIENCE
        while not hold(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process holds {path}")
            time.sleep(0.05)
        yield


def make(database: Path) -> None:
    """An empty store where there is none, whole or not at all: MLflow can't go on with migrations that were killed."""
    if database.exists() and database.stat().st_size:
        return
    from mlflow import MlflowClient

    print(f"making {database} for MLflow, once", flush=True)
    half = database.with_name(f".{database.name}.half")
    shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
    half.mkdir()
    MlflowClient(tracking_uri=f"sqlite:///{os.path.relpath(half / database.name)}").search_experiments(max_results=1)
    os.replace(half / database.name, database)
    shutil.rmtree(half)


def settle(database: Path) -> None:
    """Have pictures and files live beside the database, even when its folder moved: MLflow keeps absolute addresses.

    What lies in a folder of another name, or elsewhere with nothing beside the database, is left there."""
    if not database.exists():
        return
    beside = database.parent / "mlruns"
    with closing(sqlite3.connect(database, timeout=PATIENCE)) as db, db:
        db.execute("BEGIN IMMEDIATE")  # a locked or read-only database is found here; MLflow would try for minutes
        for (old,) in db.execute(FILES).fetchall():
            place = Path(old if old.startswith("/") else url2pathname(urlsplit(old).path))
            inner = Path(place.name) if place.name.isdigit() else Path()  # MLflow's own `Default` has mlruns/0
            root = place.parent if inner.name else place
            if root.name == beside.name and root != beside and (beside.exists() or not root.exists()):
                new = (beside / inner).as_uri()
                db.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (new, old))
                db.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE instr(artifact_uri, ?) = 1",
                    (new, len(old) + 1, f"{old}/"),
                )


def pages(database: Path) -> Iterator[tuple[str, str]]:
    """Each experiment that has runs, and where its table is below the server's address: MLflow's first page leads to
    tables of something else."""
    if database.exists():
        with closing(sqlite3.connect(database, timeout=PATIENCE)) as db:
            for number, name in db.execute(SHOWN).fetchall():
                yield name, f"#/experiments/{number}/runs"


def open_experiment(client: Any, uri: str, name: str) -> str:
    """Id of the experiment, made when missing; pictures and files of a sqlite store live beside its database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_of(uri)
        try:
            return client.create_experiment(name, database and (database.parent / "mlruns").as_uri())
        except MlflowException:  # another process was faster, on a server
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise LookupError(f"experiment {name} was deleted: restore it there, or set another tracking.experiment")
    return found.experiment_id


def open_run(
    client: Any, experiment: str, folder: Path, name: str, tags: Mapping[str, str], began: int
) -> tuple[str, bool]:
    """Id of the MLflow run that belongs to `folder`, which its mlflow_run_id remembers, and whether it was there.

    Before one is made its token stands there: a run that was made, and whose id never came back, is found again."""
    from mlflow.exceptions import MlflowException

    note = folder / "mlflow_run_id"
    known = note.read_text() if note.exists() else ""
    if known and not known.startswith(TOKEN):
        try:
            client.update_run(known, status="RUNNING")
            return known, True
        except MlflowException as error:
            if error.get_http_status_code() not in (400, 404):  # deleted, or another store's
                raise
            log.warning("this run is not in MLflow's store any more, a new one is begun there")
            known = ""
    if not known:
        atomic_write(note, known := f"{TOKEN} {secrets.token_hex(8)}")
        made = []
    else:
        made = client.search_runs([experiment], f"tags.`{TOKEN}` = '{known.split()[1]}'", max_results=1)
    if made:
        run_id = made[0].info.run_id
    else:
        tags = {**tags, TOKEN: known.split()[1]}
        run_id = client.create_run(experiment, start_time=began, tags=tags, run_name=name).info.run_id
    atomic_write(note, run_id)
    return run_id, bool(made)


# ---- what MLflow answers ---------------------------------------------------------------------------------------------
def refused(error: Exception) -> bool:
    """Would this one thing never be taken? Anything else may pass: a dead server, a lock, a full disk, an old token."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() == 400
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # requests' errors are among them
        return getattr(getattr(error, "response", None), "status_code", 0) in (400, 413, 415, 422)
    return True


def masked(text: str) -> str:
    """The text without what may be secret in an address, or in the environment for MLflow."""
    for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return re.sub(r"(?<=://)\S+(?=@)|(?<=\?)\S+", "***", text)
