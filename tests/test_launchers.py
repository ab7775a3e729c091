"""Sweeps side by side on this machine, and what a dry run tells."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit
from omegaconf import OmegaConf

from hydra_plugins.vlm_agents_launchers import slurm as slurm_launcher
from hydra_plugins.vlm_agents_launchers.local import LocalLauncher
from hydra_plugins.vlm_agents_launchers.slurm import failure
from vlm_agents.command_line import end_sweep
from vlm_agents.errors import DataError, VlmAgentsError
from vlm_agents.stopping import STATUS

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


SLURM = {  # answers as one whose jobs end at once, but for what stands in the files `queue` and, line by line, `states`
    "srun": "",
    "sbatch": "n=$(ls {place} | grep -c script); cp $1 {place}/script_$n; echo Submitted batch job 7$n",
    "squeue": 'case "$*" in *--me*) cat {place}/queue;; *) head -n 1 {place}/states; sed -i 1d {place}/states;; esac',
}


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a Slurm's commands, and of what it was given."""
    place = tmp_path_factory.mktemp("slurm")
    for name, line in SLURM.items():
        (place / name).write_text(f"#!/bin/sh\n{line.format(place=place)}\n")
        (place / name).chmod(0o755)
    for name in ("queue", "states"):
        (place / name).touch()
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    monkeypatch.setattr(slurm_launcher, "ASK_S", 0)
    monkeypatch.setattr(slurm_launcher, "POLL_S", 0.01)
    return place


def test_what_slurm_has_already_is_not_given_to_it_again(cli, slurm: Path, tmp_path: Path, capsys):
    """It is asked itself: a command may be killed before it could note what it has submitted. The resources are those
    of the jobs: swept hardware that needs the same is no matter."""
    sweep = [*WORDS, "-m", "hydra/launcher=slurm", "hardware=gpu,ddp", "hardware.processes=2"]
    assert cli(*sweep) == 2  # neither has a result
    assert "ended before its time" in capsys.readouterr().err
    first = (slurm / "script_0").read_text()
    assert "#SBATCH --array=0-1" in first
    assert "#SBATCH --gpus-per-node=2" in first
    (slurm / "queue").write_text(f"70_0 {tmp_path}/multirun/a/eval/.submitit/x.sh\n70_1 {tmp_path}/of_another.sh\n")
    assert cli(*sweep) == 2
    said = capsys.readouterr().out
    assert "job 0: Slurm's 70_0, hardware=gpu" in said
    assert "job 1: Slurm's 71, hardware=ddp" in said
    assert "array" not in (slurm / "script_1").read_text()
    assert (
        slurm_launcher.under_way(tmp_path / "multirun/a/eval/.submitit", {0: [*WORDS, "seed=1"]}) == {}
    )  # another one


def test_a_job_has_more_time_than_its_warning(cli, slurm: Path, capsys):
    """120 s, in which it would be told at each start."""
    assert cli(*WORDS, "-m", "hydra/launcher=slurm", "seed=0", "hydra.launcher.timeout_min=2") == 2
    assert "error: hydra.launcher.timeout_min=2 is over before a job's warning, signal_delay_s=120 s" in (
        capsys.readouterr().err
    )
    assert not list(slurm.glob("script_*"))


def test_a_job_that_is_queued_again_is_told(cli, slurm: Path, capsys):
    (slurm / "states").write_text("70 PENDING\n70 RUNNING\n70 RUNNING\n70 PENDING\n70 PENDING\n70 RUNNING\n")
    assert cli(*WORDS, "-m", "hydra/launcher=slurm", "seed=0") == 2  # it has no result
    assert capsys.readouterr().out.count("job 0 is queued again") == 1


def test_of_a_sweep_that_slurm_refuses_mlflow_says_that_it_failed(slurm: Path, tmp_path: Path):
    """By a process of its own: one in which MLflow has failed before leaves it alone."""
    (slurm / "sbatch").write_text("#!/bin/sh\necho too many cores >&2; exit 1\n")
    words = [*WORDS, "tracking=mlflow", "-m", "hydra/launcher=slurm", "hardware.threads=9", "seed=0"]
    command = [sys.executable, "-m", "vlm_agents", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = done.stderr
    assert "sbatch refused the jobs, and none was begun: " in said
    assert "too many cores" in said
    assert "Each asks for nodes=1 ntasks_per_node=1 cpus_per_task=9 time=240: " in said
    from mlflow import MlflowClient  # takes seconds

    run = (tmp_path / "multirun/a/eval/mlflow_run_id").read_text()
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run).info.status == "FAILED"


def test_jobs_that_need_different_resources_are_refused(cli, capsys, tmp_path: Path):
    """They would all be given those of the command without what is swept over."""
    assert cli(*WORDS, "-m", "hydra/launcher=local", "seed=0,1", "hardware=cpu,gpu") == 2
    assert "GPUs=1: give one command with -m hardware=cpu name=" in capsys.readouterr().err
    assert not (tmp_path / "multirun").exists()


def test_the_node_that_failed_is_told_and_not_one_that_lost_it(tmp_path: Path):
    """What it makes of the loss is a library's own: the one that wrote first is the one that was."""
    for when, (node, error) in enumerate([(1, "DataError: no such file (rank 1)"), (0, "TrainingError: by SIGABRT")]):
        task = submitit.SlurmJob(tmp_path, "7", [node])
        trace = f"Traceback (most recent call last):\n  File ...\nvlm_agents.errors.{error}\n"
        task.paths.result_pickle.write_bytes(pickle.dumps(("error", trace)))
        os.utime(task.paths.result_pickle, (when, when))
    found = failure(submitit.SlurmJob(tmp_path, "7"), 2)
    assert isinstance(found, VlmAgentsError)
    assert str(found).strip() == "no such file (rank 1)"


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


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_has_its_jobs_save_and_begins_no_other(tmp_path: Path):
    words = ["stage=ppo", "env=echo", "model=tiny", "prompt=action_only", "prompt.max_reply_tokens=4", "tracking=jsonl"]
    words += ["stage.init=null", "stage.episodes=4", "stage.iterations=1000", "stage.eval_episodes=0", "name=a"]
    words += ["hardware.threads=1", "-m", "hydra/launcher=local", "hydra.launcher.jobs=1", "seed=0,1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = subprocess.Popen([sys.executable, "-m", "vlm_agents", *words], cwd=tmp_path, env=env)
    sweep = tmp_path / "multirun/a/ppo"
    while not (sweep / "0/metrics.jsonl").exists() and command.poll() is None:
        time.sleep(0.05)
    command.send_signal(signal.SIGUSR2)
    assert command.wait(60) == STATUS
    iterations = len((sweep / "0/metrics.jsonl").read_text().splitlines())
    assert max(path.name for path in (sweep / "0/checkpoints").iterdir()) == f"step_{iterations:06d}"
    assert not (sweep / "1").exists()


def test_some_jobs_must_run_at_once(cli, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli(*WORDS, "-m", "hydra/launcher=local", "hydra.launcher.jobs=0", "seed=0,1") == 2
    assert "error: hydra.launcher.jobs=0 is how many jobs run at once: a number from 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gpus", "processes", "seen"),
    [("4,5,6,7", 2, ["4,5", "6,7"]), ("4,5,6", 1, ["4", "5"]), ("4,5,6", 2, ["4,5,6", "4,5,6"])],  # the last: too few
)
def test_each_job_sees_gpus_of_its_own(monkeypatch, gpus: str, processes: int, seen: list[str]):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    launcher = LocalLauncher(jobs=2)
    launcher.given = launcher.resources(OmegaConf.create({"hardware": {"device": "cuda", "processes": processes}}))
    assert [launcher.environment(place, 2)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == seen


def test_a_job_that_failed_by_a_bug_is_no_error_of_the_user(tmp_path: Path):
    launcher = LocalLauncher(jobs=2)
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    launcher.log(1).parent.mkdir()
    launcher.log(1).write_text("Traceback ...\nKeyError: 3\n")
    bug = launcher.failure(1, 1, 0)
    with pytest.raises(RuntimeError, match="2 of 3 jobs"):
        end_sweep(tmp_path, [None, DataError("no such file"), bug])
    with pytest.raises(VlmAgentsError, match="1 of 2 jobs"):
        end_sweep(tmp_path, [None, DataError("no such file")])


def test_a_job_is_not_told_by_what_an_earlier_one_said(tmp_path: Path):
    launcher = LocalLauncher(jobs=2)
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    launcher.log(1).parent.mkdir()
    launcher.log(1).write_text("error: no such folder\n")
    start = launcher.log(1).stat().st_size
    assert str(launcher.failure(1, 2, 0)) == "no such folder"
    assert str(launcher.failure(1, 2, start)) == f"exit status 2; see {launcher.log(1)}"
