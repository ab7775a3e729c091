"""MLflow on a real sqlite store, and what happens when there is none; its siblings where they are installed."""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from PIL import Image

from vlm_agents import stores, tracking
from vlm_agents.__main__ import main
from vlm_agents.backends import shown_as
from vlm_agents.config import TrackingConfig
from vlm_agents.errors import ConfigError
from vlm_agents.run import Run, finished_metrics


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made by the first run that is tracked in it: MLflow needs seconds for a new one. An earlier process was killed
    when it made one."""
    folder = tmp_path_factory.mktemp("mlflow")
    half = folder / ".mlflow.db.half"
    half.mkdir()
    (half / "mlflow.db").write_bytes(b"SQLite format 3")
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def look(store: str):
    """`look()` opens the store as a reader, `look(uri)` another one."""

    def client(uri: str = store) -> Any:
        from mlflow import MlflowClient  # takes seconds

        return MlflowClient(tracking_uri=uri)

    return client


@pytest.fixture
def made(compose_run, store: str, tmp_path: Path) -> Path:
    """The store's folder, in which a run was tracked."""
    folder = Path(store.removeprefix("sqlite:///")).parent
    if not (folder / "mlruns").exists():
        with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), []) as run:
            run.begin()
        shutil.rmtree(run.dir)
    return folder


def run_id_of(run: Run) -> str:
    return run.path("mlflow_run_id").read_text()


def test_a_run_is_told_in_full(compose_run, store: str, look, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        run.begin()
        run.log(1, {"ppo/entropy": 0.5, "ppo/bad": float("nan")})
        run.image("eval/frame", Image.new("RGB", (4, 4)), step=1)
    client = look()
    assert client.get_run(run_id_of(run)).info.status == "FINISHED"
    with Run.open(cfg, []) as run:  # goes on in the same MLflow run
        run.begin()
        run.log(2, {"ppo/entropy": 0.25})
        run.finish({"eval/success": 1.0})
    told = client.get_run(run_id_of(run))
    assert told.info.run_name == "test/ppo"
    assert told.data.tags.items() >= {"stage": "ppo", "env": cfg.env.id, "model": "tiny", "algo": "ppo"}.items()
    assert told.data.params["algo.clip"] == "0.2"
    assert told.data.params["model.lora"] == "None"
    assert told.data.metrics.items() >= {"ppo/entropy": 0.25, "eval/success": 1.0}.items()
    history = client.get_metric_history(run_id_of(run), "ppo/entropy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
    files = {entry.path for entry in client.list_artifacts(run_id_of(run))}
    assert files == {"config.yaml", "summary.json", "images"}
    assert told.info.artifact_uri.startswith(Path(store.removeprefix("sqlite:///")).parent.as_uri())
    assert client.get_experiment(told.info.experiment_id).name == "vlm_agents"
    lines = capfd.readouterr().err.splitlines()
    assert [
        line for line in lines if not line.startswith(("weights: ", "no earlier stage "))
    ] == []  # no tales of migrations


def test_a_resumed_run_tells_no_point_twice(compose_run, store: str, look) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        run.begin()
        for step in (1, 2):
            run.log(step, {"ppo/entropy": 1 / step})
    with Run.open(cfg, []) as run:
        run.begin()
        assert run.restore() is None  # no checkpoint: from the start
        for step in (1, 2, 3):
            run.log(step, {"ppo/entropy": 1 / step, "ppo/new": 0.5})
        run.finish({"ppo/entropy": 1 / 3})
    for name, expected in (
        ("ppo/entropy", [(1, 1.0), (2, 0.5), (3, 1 / 3)]),
        ("verbose/ppo/new", [(1, 0.5), (2, 0.5), (3, 0.5)]),
    ):
        assert [(point.step, point.value) for point in look().get_metric_history(run_id_of(run), name)] == expected
    assert len(run.path("metrics.jsonl").read_text().splitlines()) == 3


def test_a_crash_is_a_failed_run(compose_run, store: str, look) -> None:
    run = Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), [])
    run.begin()
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert look().get_run(run_id_of(run)).info.status == "FAILED"


def test_jobs_of_a_sweep_have_one_parent(compose_run, store: str, look, tmp_path: Path) -> None:
    sweep = tmp_path / "multirun/test/ppo"
    parents = []
    for job in ("0", "1"):
        cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}", f"run_dir={sweep / job}")
        with Run.open(cfg, [], sweep=sweep) as run:
            run.begin()
            told = look().get_run(run_id_of(run))
            assert told.info.run_name == f"test/ppo/{job}"
            parents.append(told.data.tags["mlflow.parentRunId"])
    assert parents[0] == parents[1] != run_id_of(run)
    assert look().get_run(parents[0]).info.run_name == "test/ppo"


def test_what_came_of_comparing_a_sweep_is_in_its_run(
    compose_run, store: str, look, ailing: "Answers", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    sweep, page = tmp_path / "multirun/test/ppo", tmp_path / "comparison.md"
    page.write_text("# Comparison")
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}", f"run_dir={sweep / '0'}")
    with Run.open(cfg, [], sweep=sweep) as run:
        assert "has no run there" in tracking.tell_sweep(sweep, {"compare/rank/ppo": 1.0}, [page])
        run.begin()
    assert tracking.tell_sweep(sweep, {"compare/rank/ppo": 1.0}, [page]).startswith("in MLflow: ")
    parent = (sweep / "mlflow_run_id").read_text()
    assert look().get_run(parent).data.metrics == {"compare/rank/ppo": 1.0}
    assert [file.path for file in look().list_artifacts(parent)] == ["comparison.md"]
    assert look().get_run(parent).info.status == "FINISHED"  # as it was
    (sweep / "0/config.yaml").write_text(f"tracking: {{uri: '{ailing('500')}'}}")
    assert tracking.tell_sweep(sweep, {"compare/rank/ppo": 2.0}, [page]).startswith(f"not in MLflow: {sweep}: ")
    (sweep / "mlflow_run_id").write_text("gone")
    (sweep / "0/config.yaml").write_text(f"tracking: {{uri: '{store}'}}")
    told = tracking.tell_sweep(sweep, {"compare/rank/ppo": 2.0}, [page])
    assert told.startswith(f"not in MLflow: {sweep}: ")
    assert "\n" not in told


def test_a_sweeps_run_ends_as_its_jobs_do(compose_run, store: str, look, tmp_path: Path) -> None:
    sweep = tmp_path / "multirun/test/ppo"

    def job(name: str) -> Run:
        cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}", f"run_dir={sweep / name}")
        run = Run.open(cfg, [], sweep=sweep)
        run.begin()
        return run

    def state() -> str:
        return look().get_run((sweep / "mlflow_run_id").read_text()).info.status

    first, second = job("0"), job("1")  # at the same time, as on Slurm
    assert state() == "RUNNING"
    with first:
        pass
    assert state() == "RUNNING"
    with pytest.raises(ZeroDivisionError), second:
        raise ZeroDivisionError
    assert state() == "FAILED"
    again = job("1")  # continued
    assert state() == "RUNNING"
    with again:
        pass
    assert state() == "FINISHED"
    with pytest.raises(ZeroDivisionError), job("2"):
        raise ZeroDivisionError
    shutil.rmtree(sweep / "2")
    with job("2"):  # made anew: what failed is not of this sweep any more
        pass
    assert state() == "FINISHED"
    tracking.end_sweep(sweep, "FAILED")  # for a job that was refused
    assert state() == "FAILED"


def test_report_and_animation_are_there_and_no_weights(compose_run, store: str, look) -> None:
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), ["stage=ppo"]) as run:
        run.begin()
        for name in ("report.html", "episode.gif", "episodes.jsonl", "model/model.safetensors"):
            run.path(name).parent.mkdir(exist_ok=True)
            run.path(name).touch()
        bounds = {"eval/success_low": 0.2, "eval/success_high": 0.8, "eval/success_random": 0.125}
        run.finish({"eval/success": 0.5, **bounds}, {"model": run.path("model")})
    told = look().get_run(run_id_of(run))
    files = {entry.path for entry in look().list_artifacts(run_id_of(run))}
    assert files == {"config.yaml", "summary.json", "report.html", "episode.gif"}
    assert (
        told.data.tags.items()
        >= {
            "mlflow.source.name": "python -m vlm_agents stage=ppo",
            "mlflow.source.git.commit": run.path("commit").read_text().strip(),
            "mlflow.note.content": "success 0.500 [0.200, 0.800]\n\n`python -m vlm_agents stage=ppo`",
            "weights": "model=tiny",
        }.items()
    )
    assert told.data.tags["mlflow.user"]
    assert not {"run_dir", "tracking.uri"} & told.data.params.keys()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("eval/success", "eval/success"),
        ("eval/success_low", "variants/eval/success_low"),
        ("eval/return_greedy_before", "variants/eval/return_greedy_before"),
        ("eval/entropy_greedy", "verbose/eval/entropy_greedy"),
        ("ppo/approx_kl", "ppo/approx_kl"),
        ("ppo/clip_fraction", "verbose/ppo/clip_fraction"),
        ("time/update", "verbose/time/update"),
        ("sft/loss", "sft/loss"),
        ("mine", "mine"),
    ],
)
def test_mlflow_shows_few_charts_first(name: str, shown: str) -> None:
    assert shown_as(name) == shown


def test_a_run_that_was_made_and_not_heard_of_is_found_again(
    compose_run, made: Path, store: str, look, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create, made_there = MlflowClient.create_run, []

    def cut_off(*args: Any, **words: Any) -> Any:
        made_there.append(create(*args, **words).info.run_id)
        monkeypatch.setattr(MlflowClient, "create_run", create)
        raise ConnectionError("the line went dead before the answer came")

    monkeypatch.setattr(MlflowClient, "create_run", cut_off)
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), []) as run:
        run.begin()
    assert [run_id_of(run)] == made_there


def test_a_run_that_the_store_lost_is_begun_anew(compose_run, store: str, look) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        run.begin()
    first = run_id_of(run)
    run.path("mlflow_run_id").write_text("0" * 32)
    with Run.open(cfg, []) as run:
        run.begin()
        assert run_id_of(run) not in (first, "0" * 32)


# ---- MLflow in trouble -----------------------------------------------------------------------------------------------
Answers = Callable[[str], str]


@pytest.fixture
def ailing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """`ailing("500")` is the address of a server that answers so, `ailing("hangs")` of one that never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # seconds
    released = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/hangs"):
                released.wait()
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield lambda how: f"http://127.0.0.1:{server.server_port}/{how}"
    released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "vlm_agents.tracking"]


def points_of(client: Any, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id_of(run), key)]


@pytest.mark.parametrize("trouble", ["closed", "500", "hangs", "no such store", "lock held"])
def test_trouble_costs_seconds_and_two_lines(
    compose_run, ailing: Answers, told, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    uri = {
        "closed": "http://127.0.0.1:9",
        "no such store": "nonsense://x",
        "lock held": f"sqlite:///{tmp_path}/mlflow.db",
    }
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri.get(trouble) or ailing(trouble)}")
    hold = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.lockf(file, 2); print(flush=True); input()"
    words = [sys.executable, "-c", hold, str(tmp_path / "mlflow.db.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        start = time.monotonic()
        with Run.open(cfg, []) as run:
            run.begin()
            opened = time.monotonic()
            for step in range(100):
                run.log(step, {"a": 1.0})
            run.image("b", Image.new("RGB", (4, 4)), step=1)
            run.finish({"a": 1.0})
            assert time.monotonic() - opened < 2  # nothing of it waits for MLflow
        assert time.monotonic() - start < 9
        holder.communicate(b"\n")
    assert len(run.path("metrics.jsonl").read_text().splitlines()) == 100
    assert run.path("DONE").exists()
    first, last = told()
    assert first.startswith("MLflow takes nothing for now and is tried again; metrics.jsonl goes on (")
    assert last.endswith(f"python -m vlm_agents.tracking {os.path.relpath(run.dir)} sends it")


def test_what_was_missed_is_sent_as_soon_as_the_store_is_back(
    compose_run, made: Path, look, told, tmp_path: Path
) -> None:
    where = tmp_path / "a_file"
    where.touch()  # in the place of a folder
    uri = f"sqlite:///{where}/mlflow.db"
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri}"), []) as run:
        run.begin()
        assert run._tracker is not None
        for step in range(600):  # more than one call takes
            run.log(step, {"a": float(step)})
        run.image("b", Image.new("RGB", (4, 4)), step=1)
        where.unlink()
        shutil.copytree(made, where)
        deadline = time.monotonic() + 10
        while run._tracker._files and time.monotonic() < deadline:
            time.sleep(0.05)
        assert points_of(look(uri), run, "a") == [(step, float(step)) for step in range(600)]
        run.log(600, {"a": 600.0})
    assert len(told()) == 1
    assert points_of(look(uri), run, "a")[-1] == (600, 600.0)
    assert {entry.path for entry in look(uri).list_artifacts(run_id_of(run))} == {"config.yaml", "images"}


def test_a_finished_run_is_sent_later(
    compose_run, made: Path, look, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "a_file"
    where.touch()
    uri = f"sqlite:///{where}/mlflow.db"
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri}"), []) as run:
        run.begin()
        run.log(1, {"a": 0.5, "bad": float("nan")})
        run.log(2, {"a": 0.25})
        run.finish({"success": 1.0})
    assert tracking.main([str(run.dir)]) == 1
    where.unlink()
    shutil.copytree(made, where)
    for _ in range(2):  # the second has nothing to send
        assert tracking.main([str(run.dir)]) == 0
        assert points_of(look(uri), run, "a") == [(1, 0.5), (2, 0.25)]
        assert points_of(look(uri), run, "success") == [(2, 1.0)]
    assert look(uri).get_run(run_id_of(run)).info.status == "FINISHED"
    first, second = capsys.readouterr().out.splitlines()
    assert (
        first == second == f"{run.dir}: metrics and files are all in MLflow now (4 points, 2 files sent), as finished"
    )


def test_a_killed_run_is_told_killed_and_a_live_one_is_left_alone(
    compose_run, store: str, look, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), [])
    run.begin()
    run.log(1, {"a": 0.5})
    run._lock.close()  # killed: nothing more is told
    hold = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, 2); print(flush=True); input()"
    words = [sys.executable, "-c", hold, str(run.path("lock"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert tracking.main([str(run.dir)]) == 2
        holder.communicate(b"\n")
    assert "in use by another process" in capsys.readouterr().err
    assert look().get_run(run_id_of(run)).info.status == "RUNNING"
    assert tracking.main([str(run.dir)]) == 0
    assert "as killed" in capsys.readouterr().out
    assert look().get_run(run_id_of(run)).info.status == "KILLED"
    assert points_of(look(), run, "a") == [(1, 0.5)]


def test_the_same_command_sets_a_run_right_that_was_killed_behind_its_end(compose_run, store: str, look) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    run = Run.open(cfg, [])
    run.begin()
    run.finish({"eval/success": 1.0})
    run._lock.close()
    assert look().get_run(run_id_of(run)).info.status == "RUNNING"
    assert finished_metrics(cfg) == {"eval/success": 1.0}
    told = look().get_run(run_id_of(run)).info
    assert told.status == "FINISHED"
    assert abs(told.end_time / 1000 - run.path("DONE").stat().st_mtime) < 0.01
    assert not run.path("unsent").exists()


def test_a_continued_run_sends_what_the_killed_one_could_not(compose_run, store: str, look) -> None:
    words = ("stage=ppo", f"tracking.uri={store}")
    with Run.open(compose_run(*words, "tracking=jsonl"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
        run.path("metrics.jsonl").open("a").write('not json\n["step"]\n{"step": 2, "a": null}\n')
        run.save_checkpoint(2, lambda folder: None, {})
    with Run.open(compose_run(*words, "tracking=mlflow"), []) as run:
        run.begin()
        run.restore()
        run.log(3, {"a": 3.0})
    (_, one), (_, two), (_, three) = points_of(look(), run, "a")
    assert (one, three) == (1.0, 3.0)
    assert math.isnan(two)


def test_a_locked_database_holds_nothing_up(compose_run, store: str, made: Path, look, told) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run, closing(sqlite3.connect(made / "mlflow.db")) as other:
        run.begin()
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        for step in range(20):
            run.log(step, {"a": 1.0})
        assert time.monotonic() - start < 1
        other.rollback()
    assert points_of(look(), run, "a") == [(step, 1.0) for step in range(20)]
    assert told() == []


def test_what_is_refused_spoils_nothing_else(compose_run, store: str, look, told) -> None:
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), []) as run:
        run.begin()
        for step in (1, 2):
            run.log(step, {"a": 1.0, "what?\x1b": 2.0, "b": 3.0})  # MLflow wants letters, digits and _-./: alone
        run.artifact(run.path("not_there.txt"))
        run.finish({})
    assert points_of(look(), run, "a") == [(1, 1.0), (2, 1.0)]
    assert points_of(look(), run, "b") == [(1, 3.0), (2, 3.0)]
    assert {entry.path for entry in look().list_artifacts(run_id_of(run))} == {"config.yaml", "summary.json"}
    name, file = told()
    assert name.startswith("MLflow refuses what?\\x1b, and does without it (")
    assert file.startswith("MLflow refuses not_there.txt, and does without it (")


def test_what_the_user_deletes_there_is_told_once(compose_run, store: str, look, told, tmp_path: Path) -> None:
    words = ("stage=ppo", "tracking=mlflow", f"tracking.uri={store}", "tracking.experiment=doomed")
    with Run.open(compose_run(*words), []) as run:
        run.begin()
        look().delete_run(run_id_of(run))
        for step in range(5):
            run.log(step, {"a": 1.0})
    first, *_, last = told()
    assert "must be in the 'active' state" in first
    assert last == "MLflow lacks a part of this run; once MLflow works again, the run sends it when it is continued"
    assert len(told()) == 2
    look().delete_experiment(look().get_experiment_by_name("doomed").experiment_id)
    with Run.open(compose_run(*words, f"run_dir={tmp_path / 'next'}"), []) as run:
        run.begin()
    assert "experiment doomed was deleted: restore it there, or set another tracking.experiment" in told()[2]


def test_a_database_is_made_beside_the_rest_of_a_killed_attempt(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlruns"}


# ---- where the store is ----------------------------------------------------------------------------------------------
def test_the_default_store_lies_in_the_working_directory_whatever_its_name(
    compose_run, made: Path, look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh database takes seconds: this one is a copy, whose experiment is left out."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = tmp_path / "a?b #1 100%41 ä"
    here.mkdir()
    shutil.copy(made / "mlflow.db", here)
    monkeypatch.chdir(here)
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", "tracking.experiment=fresh"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
        run.image("b", Image.new("RGB", (4, 4)), step=1)
    assert {path.name for path in tmp_path.iterdir()} == {here.name, "run"}
    assert {path.name for path in here.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlruns"}
    artifacts = here / "mlruns" / run_id_of(run) / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {"config.yaml", "images"}
    client = look("sqlite:///mlflow.db")
    assert points_of(client, run, "a") == [(1, 1.0)]
    assert {entry.path for entry in client.list_artifacts(run_id_of(run))} == {"config.yaml", "images"}


def test_a_relative_address_is_taken(
    compose_run, made: Path, look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "sub")
    monkeypatch.chdir(tmp_path)
    uri = "sqlite:///sub/mlflow.db"
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri}"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
    assert points_of(look(uri), run, "a") == [(1, 1.0)]
    assert (tmp_path / "sub/mlflow.db.lock").exists()
    assert (tmp_path / "sub/mlruns" / run_id_of(run) / "artifacts/config.yaml").exists()


def test_files_follow_a_folder_that_moved(compose_run, made: Path, look, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(made, old)
    stores.settle(old / "mlflow.db")
    client = look(f"sqlite:///{old}/mlflow.db")
    before = client.create_run(client.get_experiment_by_name("vlm_agents").experiment_id).info
    assert before.artifact_uri == (old / "mlruns" / before.run_id / "artifacts").as_uri()
    picture = old / "mlruns" / before.run_id / "artifacts/images/old.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    old.rename(new)
    uri = f"sqlite:///{new}/mlflow.db"
    for name, pictures in (("continued", 2), ("fresh", 1)):
        cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri}", f"run_dir={tmp_path / name}")
        if name == "continued":
            (tmp_path / name).mkdir()
            (tmp_path / name / "mlflow_run_id").write_text(before.run_id)
            (tmp_path / name / "lock").touch()  # as every run directory has it
        with Run.open(cfg, []) as run:
            run.begin()
            run.image("b", Image.new("RGB", (4, 4)), step=1)
        assert len(list((new / "mlruns" / run_id_of(run) / "artifacts/images").glob("*.png"))) == pictures
        told = look(uri).list_artifacts(run_id_of(run), "images")  # as the UI finds them
        assert sum(entry.path.endswith(".png") for entry in told) == pictures
    assert not old.exists()


def test_mlflows_own_experiment_follows_too(made: Path, look, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "new")
    stores.settle(tmp_path / "new/mlflow.db")
    places = [one.artifact_location for one in look(f"sqlite:///{tmp_path}/new/mlflow.db").search_experiments()]
    assert (tmp_path / "new/mlruns/0").as_uri() in places
    assert all(place.startswith((tmp_path / "new/mlruns").as_uri()) for place in places)


def test_files_that_somebody_keeps_elsewhere_stay_there(compose_run, made: Path, look, tmp_path: Path) -> None:
    shutil.copy(made / "mlflow.db", tmp_path)
    elsewhere = tmp_path / "disk/mlruns"
    elsewhere.mkdir(parents=True)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name, place in (("own", elsewhere.as_uri()), ("bucket", "s3://bucket/mlruns")):
        look(uri).create_experiment(name, place)
    stores.settle(tmp_path / "mlflow.db")
    assert look(uri).get_experiment_by_name("own").artifact_location == elsewhere.as_uri()
    assert look(uri).get_experiment_by_name("bucket").artifact_location == "s3://bucket/mlruns"


def test_the_environment_names_store_and_experiment(
    compose_run, store: str, look, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with Run.open(compose_run("stage=ppo", "tracking=mlflow"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
    assert capfd.readouterr().out == f"MLflow: {store}, which MLFLOW_TRACKING_URI names\n"
    experiment = look().get_run(run_id_of(run)).info.experiment_id
    assert look().get_experiment(experiment).name == "mine"


# ---- secrets ---------------------------------------------------------------------------------------------------------
SECRET = "hunter2"


def test_secrets_of_the_environment_are_masked(
    compose_run, told, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:9?token={SECRET}")
    with Run.open(compose_run("stage=ppo", "tracking=mlflow"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
    out, err = capfd.readouterr()
    assert out == "MLflow: http://***@127.0.0.1:9?***, which MLFLOW_TRACKING_URI names\n"
    kept = [path.read_text() for path in run.dir.iterdir() if path.is_file()]
    assert not any(SECRET in text for text in (out, err, *told(), *kept))


@pytest.mark.parametrize(
    "uri",
    [f"http://user:{SECRET}@host", f"https://{SECRET}@host", f"http://host?token={SECRET}", f"mysql://u:{SECRET}@h/db"],
)
def test_an_address_with_a_secret_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as caught:
        TrackingConfig("mlflow", uri)
    assert SECRET not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it
    monkeypatch.setattr("sys.argv", ["vlm-agents", "-m", "stage=collect", "seed=0,1", f"tracking.uri='{uri}'"])
    assert main() == 2
    out, err = capfd.readouterr()
    assert "MLFLOW_TRACKING_URI" in err
    assert SECRET not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "uri", ["sqlite:////home/me@work/mlflow.db", "postgresql://host/db", "http://host:5000/mlflow"]
)
def test_an_address_without_a_secret_is_taken(uri: str) -> None:
    assert TrackingConfig("mlflow", uri).uri == uri


# ---- the siblings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_and_the_run_goes_on(
    compose_run, told, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with Run.open(compose_run("stage=ppo", f"tracking={name}"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
    (line,) = told()
    assert line.startswith(f"tracking={name} is off, metrics.jsonl goes on (")
    assert "pip install " in line


def test_tensorboard_has_each_point_once(compose_run) -> None:
    pytest.importorskip("tensorboardX")
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = compose_run("stage=ppo", "tracking=tensorboard")
    for first in (1, 2):  # the second process goes on from the first one's checkpoint
        with Run.open(cfg, []) as run:
            run.begin()
            run.restore()
            for step in (first, first + 1):
                run.log(step, {"a": 1 / step})
                run.image("b", Image.new("RGB", (4, 4)), step)
                if step == 1:
                    run.save_checkpoint(step, lambda folder: None, {})
    shown = loader.EventAccumulator(str(run.path("tensorboard"))).Reload()
    assert [(point.step, point.value) for point in shown.Scalars("a")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert [picture.step for picture in shown.Images("b")] == [1, 2, 3]


def test_wandb_asks_nobody_and_goes_on_in_the_same_run(compose_run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    cfg = compose_run("stage=ppo", "tracking=wandb")
    for _ in range(2):
        with Run.open(cfg, []) as run:
            run.begin()
            run.restore()
            for step in (1, 2):
                run.log(step, {"a": 1 / step})
    folder = Path(cfg.run_dir, "wandb")
    kept = json.loads((folder / "told.json").read_text())
    assert kept["last"] == {"a": 2}
    assert len(list(folder.glob(f"offline-run-*-{kept['id']}"))) == 2


def test_jsonl_knows_no_mlflow(compose_run, tmp_path: Path) -> None:
    with Run.open(compose_run("stage=ppo"), []) as run:
        run.begin()
        run.log(1, {"a": 1.0})
    assert not run.path("mlflow_run_id").exists()


def test_the_page_of_an_experiments_runs_is_told(compose_run, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.main([]) == 0
    assert capsys.readouterr().out == ""  # no store yet
    with Run.open(
        compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"), []
    ) as run:
        run.begin()
    capsys.readouterr()
    assert tracking.main([]) == 0
    assert capsys.readouterr().out == "runs of vlm_agents: http://127.0.0.1:5000/#/experiments/1/runs\n"
