"""MLflow on a real sqlite store, and what happens when there is none."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_agents.run import Run
from vlm_agents.tracking import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made by the first run that is tracked in it: MLflow needs seconds for a new one."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def look(store: str):
    """`look()` opens the store as a reader."""

    def client() -> Any:
        from mlflow import MlflowClient  # takes seconds

        return MlflowClient(tracking_uri=store)

    return client


def run_id_of(run: Run) -> str:
    return run.path("mlflow_run_id").read_text()


def test_a_run_is_told_in_full(compose_run, store: str, look, capfd: pytest.CaptureFixture[str]) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        run.log(1, {"ppo/entropy": 0.5, "ppo/bad": float("nan")})
        run.image("eval/frame", Image.new("RGB", (4, 4)), step=1)
    client = look()
    assert client.get_run(run_id_of(run)).info.status == "FINISHED"
    with Run.open(cfg, []) as run:  # goes on in the same MLflow run
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
    assert capfd.readouterr().err == ""  # no tales of migrations


def test_a_resumed_run_tells_no_point_twice(compose_run, store: str, look) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        for step in (1, 2):
            run.log(step, {"ppo/entropy": 1 / step})
    with Run.open(cfg, []) as run:
        assert run.restore() is None  # no checkpoint: from the start
        for step in (1, 2, 3):
            run.log(step, {"ppo/entropy": 1 / step, "ppo/new": 0.5})
        run.finish({"ppo/entropy": 1 / 3})
    for name, expected in (
        ("ppo/entropy", [(1, 1.0), (2, 0.5), (3, 1 / 3)]),
        ("ppo/new", [(1, 0.5), (2, 0.5), (3, 0.5)]),
    ):
        assert [(point.step, point.value) for point in look().get_metric_history(run_id_of(run), name)] == expected
    assert len(run.path("metrics.jsonl").read_text().splitlines()) == 3


def test_a_crash_is_a_failed_run(compose_run, store: str, look) -> None:
    run = Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), [])
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert look().get_run(run_id_of(run)).info.status == "FAILED"


def test_jobs_of_a_sweep_have_one_parent(compose_run, store: str, look, tmp_path: Path) -> None:
    sweep = tmp_path / "multirun/test/ppo"
    parents = []
    for job in ("0", "1"):
        cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}", f"run_dir={sweep / job}")
        with Run.open(cfg, [], sweep=sweep) as run:
            told = look().get_run(run_id_of(run))
            assert told.info.run_name == f"test/ppo/{job}"
            parents.append(told.data.tags["mlflow.parentRunId"])
    assert parents[0] == parents[1] != run_id_of(run)
    assert look().get_run(parents[0]).info.run_name == "test/ppo"


def test_a_run_that_the_store_lost_is_begun_anew(compose_run, store: str, look) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}")
    with Run.open(cfg, []) as run:
        first = run_id_of(run)
        run.path("mlflow_run_id").write_text("0" * 32)
    with Run.open(cfg, []) as run:
        assert run_id_of(run) not in (first, "0" * 32)


def test_without_a_store_the_run_goes_on(compose_run, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    cfg = compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/a_file/mlflow.db")
    (tmp_path / "a_file").touch()
    with caplog.at_level(logging.WARNING), Run.open(cfg, []) as run:
        run.log(1, {"a": 1.0})
        run.image("b", Image.new("RGB", (4, 4)), step=1)
        run.finish({"a": 1.0})
    assert [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()] == [{"step": 1, "a": 1.0}]
    assert run.path("DONE").exists()
    warnings = [record.getMessage() for record in caplog.records if record.name == "vlm_agents.tracking"]
    assert len(warnings) == 1
    assert warnings[0].startswith("MLflow is off for the rest of this run")


def test_a_failure_midway_is_told_once(compose_run, store: str, caplog: pytest.LogCaptureFixture) -> None:
    with Run.open(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={store}"), []) as run:
        tracker = run._tracker
        tracker._run_id = "gone"  # someone deletes the run in the UI
        with caplog.at_level(logging.WARNING):
            run.log(1, {"a": 1.0})
            run.log(2, {"a": 2.0})
    assert sum("MLflow is off" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x"])
def test_a_bad_uri_never_raises(compose_run, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    start = time.monotonic()
    tracker = Tracker(compose_run("stage=ppo", "tracking=mlflow", f"tracking.uri={uri}"), "", None)
    tracker.metrics(1, {"a": 1.0})
    tracker.close("FINISHED")
    assert time.monotonic() - start < 10


def test_jsonl_knows_no_mlflow(compose_run, tmp_path: Path) -> None:
    with Run.open(compose_run("stage=ppo"), []) as run:
        run.log(1, {"a": 1.0})
    assert not run.path("mlflow_run_id").exists()
