"""Sweeps side by side on this machine, and what a dry run tells."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hydra_plugins.vlm_agents_launchers.local import LocalLauncher
from vlm_agents.command_line import end_sweep
from vlm_agents.errors import DataError, VlmAgentsError

WORDS = ["stage=eval", "stage.policy=random", "env=echo", "stage.episodes=2", "stage.baselines=false", "name=a"]
WORDS += ["tracking=jsonl", "hardware.threads=1"]


def test_jobs_run_in_processes_and_one_that_fails_is_told(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    # there is no env of the second's id, which its own process finds
    assert cli(*WORDS, "-m", "hydra/launcher=local", "env.id=vlm_agents/Echo-v0,Nowhere-v9", "seed=0") == 2
    said = capsys.readouterr()
    sweep = tmp_path / "multirun/a/eval"
    assert (sweep / "0/DONE").exists()
    assert f"job 0 begins: env.id=vlm_agents/Echo-v0; {Path('multirun/a/eval/logs/0.log')}" in said.out
    assert said.out.count("finished") == 1
    assert "error: job 1: " in said.err
    assert "1 of 2 jobs of multirun/a/eval failed" in said.err
    assert (sweep / "logs/0.log").read_text().count("eval finished in") == 1


def test_a_dry_run_makes_nothing(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    slurm = ["-m", "seed=0,1,2", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hardware=ddp"]
    assert cli(*WORDS, *slurm, "hydra.launcher.mem_gb=64", "--dry-run") == 0
    said = capsys.readouterr().out
    idle = "warning: 8 ranks share 2 episodes (stage.episodes): 6 of them idle"
    assert said.startswith(f"3 jobs of stage=eval in multirun/a/eval\n{idle}\n#!/bin/bash")
    for line in ("array=0-2%3", "partition=gpu", "gpus-per-node=8", "mem=64GB", "nodes=1", "requeue"):
        assert f"#SBATCH --{line}\n" in said
    assert not list(tmp_path.iterdir())
    assert cli("stage=ppo", "env=echo", "name=a", "hardware.processes=65", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "memory of one, as stage=doctor expects it: 0." in said
    assert "65 ranks share 64 starts an iteration" in said
    assert not list(tmp_path.iterdir())


def test_a_launcher_is_for_a_sweep(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for more in ([], ["--dry-run"]):
        assert cli(*WORDS, "hydra/launcher=local", *more) == 2
        said = "error: hydra/launcher=local is for jobs of a sweep, even of one: add -m, or leave it out\n"
        assert capsys.readouterr().err.endswith(said)
    assert not list(tmp_path.iterdir())


def test_without_a_slurm_a_sweep_leaves_nothing(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cli(*WORDS, "-m", "seed=0,1", "hydra/launcher=slurm") == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_jobs_end_with_the_command(tmp_path: Path, sent: signal.Signals, status: int):
    long = [*WORDS, "stage.episodes=1000000", "-m", "hydra/launcher=local"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = subprocess.Popen([sys.executable, "-m", "vlm_agents", *long], cwd=tmp_path, env=env)
    log = tmp_path / "multirun/a/eval/logs/0.log"
    while not (log.parent.parent / "0/lock").exists() and command.poll() is None:
        time.sleep(0.05)
    (job,) = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.send_signal(sent)
    assert command.wait(30) == status
    deadline = time.monotonic() + 30
    while Path(f"/proc/{job}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{job}").exists()
    assert "terminated" in log.read_text()


@pytest.mark.parametrize(
    ("gpus", "processes", "seen"),
    [("4,5,6,7", 2, ["4,5", "6,7"]), ("4,5,6", 1, ["4", "5"]), ("4,5,6", 2, ["4,5,6", "4,5,6"])],  # the last: too few
)
def test_each_job_sees_gpus_of_its_own(monkeypatch, gpus: str, processes: int, seen: list[str]):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    launcher = LocalLauncher(jobs=2)
    launcher.config = OmegaConf.create({"hardware": {"device": "cuda", "processes": processes}})
    assert [launcher.environment(place, 2)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == seen


def test_a_job_that_failed_by_a_bug_is_no_error_of_the_user(tmp_path: Path):
    launcher = LocalLauncher(jobs=2)
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    launcher.log(1).parent.mkdir()
    launcher.log(1).write_text("Traceback ...\nKeyError: 3\n")
    bug = launcher.failure(1, 1)
    with pytest.raises(RuntimeError, match="2 of 3 jobs"):
        end_sweep(tmp_path, [None, DataError("no such file"), bug])
    with pytest.raises(VlmAgentsError, match="1 of 2 jobs"):
        end_sweep(tmp_path, [None, DataError("no such file")])
