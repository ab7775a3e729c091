"""Sweeps on a real Slurm, of this machine alone: `make slurm-test`. Skipped where none is up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from kill_drill import differences
from mlflow import MlflowClient


def is_up() -> bool:
    try:
        done = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return {"low", "high"} <= {name.rstrip("*") for name in done.stdout.split()}


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not is_up(), reason="no Slurm is up: make slurm-test")]

RUN = ["stage=ppo", "env=echo", "stage.iterations=4", "stage.num_envs=4", "stage.episodes=4", "stage.eval_episodes=4"]
RUN += ["stage.checkpoint_every=1", "prompt.max_reply_tokens=16", "hardware.threads=1"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1"]


def begun(place: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vlm_agents", "-m", *RUN, *SLURM, *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def runs(place: Path) -> list[tuple[str, str, bool]]:
    """Of MLflow: name, status, and whether it is in another."""
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    ids = [one.experiment_id for one in client.search_experiments()]
    told = [(run.info, "mlflow.parentRunId" in run.data.tags) for run in client.search_runs(ids)]
    return sorted((str(info.run_name), str(info.status), inside) for info, inside in told)


def interrupted(place: Path, *words: str) -> Path:
    """The folder of a sweep of one job, which was told of its end once it had a checkpoint."""
    told = begun(place, *words)
    folder = place / f"multirun/{words[-1].removeprefix('name=')}/ppo"
    while told.poll() is None and not list(folder.glob("0/checkpoints/step_*")):
        time.sleep(0.05)
    run = (folder / "0/mlflow_run_id").read_text()
    for name in queue(place):
        subprocess.run(["scancel", "--signal=USR2", name], check=True)
    said, _ = told.communicate()
    assert told.returncode == 0, said
    assert (folder / "0/mlflow_run_id").read_text() == run
    return folder


def queue(place: Path) -> Sequence[str]:
    """Slurm's jobs whose scripts lie in this folder."""
    told = subprocess.run(["squeue", "-h", "-r", "-o", "%i %o"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in told.splitlines() if str(place) in line]


def test_a_sweep_finishes_and_is_one_parent_with_a_run_for_each_job(tmp_path: Path):
    sweep = begun(tmp_path, "seed=0,1", "name=a")
    said, _ = sweep.communicate()
    assert sweep.returncode == 0, said
    assert "job 1 finished" in said
    jobs = sorted((tmp_path / "multirun/a/ppo").glob("*/summary.json"))
    assert [json.loads(path.read_text())["seed"] for path in jobs] == [0, 1]
    inside = [(f"a/ppo/{job}", "FINISHED", True) for job in (0, 1)]
    assert runs(tmp_path) == [("a/ppo", "FINISHED", False), *inside]
    assert not queue(tmp_path)


def test_a_job_that_is_told_of_its_end_goes_on_in_the_same_run(tmp_path: Path):
    plain = begun(tmp_path, "seed=1", "name=plain")
    assert plain.wait() == 0, plain.communicate()
    folder = interrupted(tmp_path, "seed=1", "name=told")
    (log,) = (folder / ".submitit").glob("*_log.out")
    assert log.read_text().count("Loading pickle") == 2
    assert not list(differences(tmp_path / "multirun/plain/ppo/0", folder / "0"))
    assert [name for name, _, inside in runs(tmp_path) if inside] == ["plain/ppo/0", "told/ppo/0"]


def test_a_job_of_two_nodes_goes_on_too_and_the_first_node_tells(tmp_path: Path):
    folder = interrupted(tmp_path, "stage.eval_episodes=0", "hardware.nodes=2", "name=two")
    first, second = (path.read_text() for path in sorted((folder / ".submitit").glob("*_log.out")))
    assert first.count("Loading pickle") == second.count("Loading pickle") == 2
    assert "I am a slave" in second
    assert first.count("ppo finished in") == 1
    assert "finished" not in second
    steps = [json.loads(line)["step"] for line in (folder / "0/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert [name for name, _, inside in runs(tmp_path) if inside] == ["two/ppo/0"]


def test_a_job_that_fails_is_told_and_the_other_finishes(tmp_path: Path):
    sweep = begun(tmp_path, "stage.init=null,nowhere", "name=a", "tracking=jsonl")
    said, _ = sweep.communicate()
    assert sweep.returncode == 2
    assert "error: job 1: " in said
    assert "nowhere" in said
    assert "1 of 2 jobs of multirun/a/ppo failed" in said
    assert (tmp_path / "multirun/a/ppo/0/DONE").exists()
