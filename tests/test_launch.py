"""Runs of several ranks, as they are started: what they share comes out as one process has it, and whatever ends one of
them ends all, is told once, and can be gone on from.

Ranks are processes that import torch: seconds each. So each start here serves for several questions.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vlm_agents.config import RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ConfigError
from vlm_agents.launch import Nodes, has_ranks, idle
from vlm_agents.stopping import STATUS

Cli = Callable[..., int]
ComposeRun = Callable[..., RunConfig]
SHORT = ["tracking=jsonl", "hardware.threads=1", "model=tiny", "prompt=action_only", "prompt.max_reply_tokens=4"]
PPO = [*SHORT, "stage=ppo", "env=echo", "stage.init=null", "stage.episodes=4", "stage.num_envs=4", "stage.iterations=3"]
PPO += ["stage.eval_episodes=0", "stage.checkpoint_every=1", "algo.value_warmup=0", "algo.minibatch_turns=6"]
TWO = "hardware.processes=2"
# An env and an algorithm that go wrong on one rank. The parent of a rank is its launcher.
OWN = """
import atexit, os, signal, time
from dataclasses import replace
from pathlib import Path
from vlm_agents.config import EchoConfig
from vlm_agents.envs.echo import EchoEnv

RANK = os.environ.get("RANK")


class Faulty(EchoEnv):
    def __init__(self, fault, run, turns):
        super().__init__(EchoConfig(turns=turns))
        self.fault, self.begun = fault, Path(f"outputs/{run}/ppo/checkpoints/step_000001")

    def reset(self, seed):
        if RANK == "1" and self.begun.exists():
            if self.fault == "broken":
                raise RuntimeError("the env is broken")
            if self.fault == "killed" and not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "gone":
                os._exit(7)
            if self.fault == "late":
                atexit.register(os.kill, os.getpid(), signal.SIGKILL)
        return super().reset(seed)


def env(fault="", run="a", turns=3):
    return Faulty(fault, run, turns)


def algorithm(algorithm, algo, error):
    (coef, term), *others = algorithm.terms

    def faulty(scores, targets):
        if RANK == "1":
            raise {"MemoryError": MemoryError, "ValueError": ValueError}[error]("no such thing")
        return term(scores, targets)

    return replace(algorithm, terms=((coef, faulty), *others))
"""
FAULTY = ["env=custom", "env.factory=own:env", "env.id=vlm_agents/Echo-v0"]


@pytest.fixture
def place(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module `own`."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if not name.startswith(("time/", "speed/"))} for line in lines]


def furthest(folder: Path, other: Path) -> float:
    """The furthest that a tensor of the two models is, as a share of its norm. Without the biases of keys: a softmax
    doesn't see them, so that their gradient is rounding, of which Adam makes a full step."""
    one, two = (load_file(path / "model/model.safetensors") for path in (folder, other))
    names = [name for name in one if not name.endswith(("k_proj.bias", "qkv.bias"))]
    return max(float((one[name] - two[name]).norm() / one[name].norm()) for name in names)


def alike(folder: Path, other: Path, rel: float) -> None:
    for line, its in zip(metrics_of(folder), metrics_of(other), strict=True):
        assert line == pytest.approx(its, rel=rel, abs=1e-9)


def ranks_there(place: Path) -> list[Path]:
    """Processes of ranks that work in this directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if (process / "cwd").resolve() == place and b"vlm_agents.worker" in (process / "cmdline").read_bytes():
                found.append(process)
    return found


@contextmanager
def once_there(path: Path, number: int, process: int) -> Iterator[None]:
    """Sends the process a signal once there is such a file."""

    def send() -> None:
        while not path.exists():
            if over.wait(0.02):
                return
        os.kill(process, number)

    over = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---- what is shared comes out as one process has it ------------------------------------------------------------------
@pytest.mark.slow
def test_sft_of_two_ranks_is_that_of_one_stopped_or_not(cli: Cli, echo_chats: Path, place: Path):
    """46 rows in batches of 5: the last has one, and a rank none. The run of two is asked to stop as it begins."""
    words = [*SHORT, "stage=sft", f"stage.data={echo_chats}", "stage.batch_size=5", "stage.warmup_steps=0"]
    words += ["stage.lr=1e-5", "stage.checkpoint_every=100"]
    assert cli(*words, "name=one") == 0
    one, two = (place / f"outputs/{name}/sft" for name in ("one", "two"))
    with once_there(two / "lock", signal.SIGUSR2, os.getpid()):
        assert cli(*words, TWO, "name=two") == STATUS
    assert len(list((two / "checkpoints").iterdir())) == 1  # of the step in which it was asked
    assert cli(*words, TWO, "name=two") == 0
    alike(one, two, 1e-5)
    assert [line.get("sft/loss") for line in metrics_of(one)] == pytest.approx(
        [line.get("sft/loss") for line in metrics_of(two)], rel=1e-6
    )
    assert furthest(one, two) < 1e-5


@pytest.mark.slow
def test_a_model_collects_and_is_evaluated_by_two_ranks_as_by_one(
    run_stage: Callable[..., Path], cli: Cli, place: Path
):
    """What is there already is kept: rank 1, which sees none of the record, plays the blocks that lack."""
    words = [*SHORT, "env=echo", "stage.init=null", "stage.num_envs=2"]
    collect = [*words, "stage=collect", "stage.policy=model", "stage.episodes=12"]
    assert cli(*collect, "name=one") == 0
    folder, whole = place / "outputs/one/collect", place / "whole"
    shutil.copytree(folder, whole)
    for name in ("DONE", "summary.json"):
        (folder / name).unlink()
    lines = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_text("".join(lines[:5]))  # of blocks of 8
    assert cli(*collect, TWO, "name=one") == 0
    played = [
        [(one.seed, one.stop, [turn.reply.text for turn in one.turns]) for one in read_episodes(path)]
        for path in (whole, folder)
    ]
    assert played[0] == played[1]
    assert (folder / "episodes.jsonl").read_text().startswith("".join(lines[:5]))
    evaluate = [*words, "stage=eval", "stage.episodes=5", "stage.report_episodes=2"]
    for more, name in (([], "one"), ([TWO], "two")):
        assert cli(*evaluate, *more, f"name={name}") == 0
    one, two = (place / f"outputs/{name}/eval" for name in ("one", "two"))
    alike(one, two, 1e-6)
    assert len(list(read_episodes(two))) == 5
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert len((two / "report.html").read_text()) == pytest.approx(len((one / "report.html").read_text()), rel=0.01)


@pytest.mark.slow
def test_a_rank_that_has_less_to_do_or_whose_env_breaks_holds_nobody_up(
    cli: Cli, place: Path, capsys: pytest.CaptureFixture[str]
):
    """Mini-batches of one turn, so that a rank has no row of each; algo.target_kl ends the update after the first; in
    the second iteration the env of rank 1 breaks. And filters that keep no group, which learn nothing."""
    words = [*PPO, *FAULTY, "env.kwargs={fault: broken, run: less, turns: 1}", "stage.iterations=2", "stage.episodes=2"]
    words += ["algo.minibatch_turns=1", "algo.target_kl=1e-9", "algo.lr=1e-2"]
    assert cli(*words, TWO, "name=less") == 0
    first, second = (line for line in metrics_of(place / "outputs/less/ppo") if "ppo/updates" in line)
    assert (first["rollout/env_errors"], second["rollout/env_errors"]) == (0, 1)
    assert (first["ppo/updates"], second["ppo/updates"]) == (2, 1)  # of two epochs of two, and of one turn
    words = [*PPO, "algo=dapo", "algo.group_size=2", "stage.iterations=1", "env.turns=1"]
    assert cli(*[word for word in words if not word.startswith("algo.value")], TWO, "name=none") == 0
    (line,) = (line for line in metrics_of(place / "outputs/none/ppo") if "ppo/kept" in line)
    assert (line["ppo/kept"], line["ppo/updates"]) == (0, 0)
    assert "warning" not in capsys.readouterr().err


# ---- what ends one of them -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError", "MemoryError"])
def test_an_error_of_one_rank_ends_all_and_is_told_once(error: str, cli: Cli, place: Path, capfd):
    """An error that the user can mend in a line, with status 2; one that is nobody's with its traceback."""
    words = [*PPO, "algo.factory=own:algorithm", f"algo.kwargs={{error: {error}}}", TWO, "name=a"]
    begun = time.monotonic()
    if error == "ValueError":
        assert cli(*words) == 2
        said = capfd.readouterr().err
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert "algo.factory=own:algorithm: training with what it gives fails: ValueError: no such thing" in line
        assert line.endswith("(rank 1)")
        assert "Traceback" not in said
    else:
        with pytest.raises(Exception, match=r"^rank 1: Traceback[^$]*MemoryError: no such thing") as caught:
            cli(*words)
        assert "Traceback" not in capfd.readouterr().err
        assert str(caught.value).count("Traceback") == 1
    assert time.monotonic() - begun < 120
    assert not ranks_there(place)


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_the_iteration_and_no_more(cli: Cli, place: Path, capfd):
    """All begin again from the newest checkpoint; without hardware.restarts that is left to the next command. A run
    that is asked to stop, as Slurm asks, goes on alike."""
    own = [*PPO, *FAULTY, TWO, "stage.iterations=2"]
    assert cli(*own, "env.kwargs={fault: ''}", "name=whole") == 0
    whole = place / "outputs/whole/ppo"
    capfd.readouterr()
    assert cli(*own, "env.kwargs={fault: killed, run: killed}", "name=killed") == 0
    said = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL: all ranks begin again from the newest checkpoint, 2 more times" in said
    assert "continues after iteration 1 of 2, from checkpoints/step_000001" in said
    alike(place / "outputs/killed/ppo", whole, 1e-6)
    (place / "killed").unlink()
    once = [*own, "env.kwargs={fault: killed, run: once}", "hardware.restarts=0", "name=once"]
    with once_there(place / "outputs/once/ppo/lock", signal.SIGUSR2, os.getpid()):
        assert cli(*once) == STATUS
    assert "stopped; the same command with the run's name= continues it\n" in capfd.readouterr().err
    assert cli(*once) == 2
    said = capfd.readouterr().err
    assert "error: rank 1 was killed by SIGKILL; the same command continues from the newest checkpoint\n" in said
    assert cli(*once) == 0
    alike(place / "outputs/once/ppo", whole, 1e-6)


@pytest.mark.slow
def test_a_rank_that_is_killed_when_all_is_written_costs_nothing(cli: Cli, place: Path, capfd, monkeypatch):
    (place / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))
    assert cli(*PPO, *FAULTY, TWO, "stage.iterations=2", "env.kwargs={fault: late, run: late}", "name=late") == 0
    assert not list((place / "temporary").iterdir())
    said = capfd.readouterr()
    assert "ppo finished in" in said.out
    assert "begin again" not in said.err


@pytest.mark.slow
def test_a_rank_that_ends_itself_is_no_lost_one(cli: Cli, place: Path):
    with pytest.raises(Exception, match=r"^rank 1 ended itself with status 7$"):
        cli(*PPO, *FAULTY, TWO, "env.kwargs={fault: gone}", "name=a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_all_ranks(number: int, status: int, word: str, place: Path):
    line = ["nohup", sys.executable, "-m", "vlm_agents", *PPO, "stage.iterations=1000", TWO, "name=a"]
    with (
        subprocess.Popen(line, cwd=place, stderr=subprocess.PIPE, text=True) as launcher,
        once_there(place / "outputs/a/ppo/lock", signal.SIGHUP, launcher.pid),
        once_there(place / "outputs/a/ppo/checkpoints/step_000001", number, launcher.pid),
    ):
        said = launcher.communicate(timeout=200)[1]
    assert launcher.returncode == status
    assert said.splitlines()[-1] == f"{word}; the same command with the run's name= continues it"
    assert "Traceback" not in said
    assert "death signal" not in said  # as torch's launcher has it
    assert not ranks_there(place)


# ---- who has ranks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["stage=ppo"], True),
        (["stage=sft", "stage.data=chats"], True),
        (["stage=eval"], True),
        (["stage=collect", "stage.policy=model"], True),
        (["stage=eval", "stage.policy=expert"], False),
        (["stage=collect"], False),
        (["stage=collect", "stage.policy=remote", "stage.remote.model=m"], False),
        (["stage=preprocess", "stage.data=[played]"], False),
        (["stage=merge"], False),
        (["stage=doctor"], False),
        (["stage=serve"], False),
    ],
)
def test_ranks_are_for_those_who_pass_rows_through_a_model(words: list[str], wanted: bool, compose_run: ComposeRun):
    cfg = compose_run(*words, "env=echo", "hardware=zero2" if "stage=sft" not in words else "hardware=ddp")
    assert has_ranks(cfg) == wanted
    assert not has_ranks(compose_run(*words, "env=echo", "hardware=cpu"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stage=ppo", "stage.episodes=4"], ""),
        (["stage=ppo", "stage.episodes=3"], "4 ranks share 3 starts an iteration"),
        (["stage=ppo", "stage.episodes=8", "algo=grpo", "algo.group_size=8"], "4 ranks share 1 starts an iteration"),
        (["stage=eval", "stage.episodes=2"], r"4 ranks share 2 episodes \(stage.episodes\): 2 of them idle"),
        (["stage=sft", "stage.data=chats", "stage.batch_size=1"], "4 ranks share 1 rows a step"),
    ],
)
def test_too_many_ranks_are_told(words: list[str], line: str, compose_run: ComposeRun):
    assert re.match(f"(warning: )?{line}", idle(compose_run(*words, "env=echo", "hardware.processes=4")))


def test_nodes_are_those_of_a_slurm_job(cli: Cli, capsys: pytest.CaptureFixture[str]):
    assert cli(*PPO, "hardware.nodes=2") == 2
    assert capsys.readouterr().err == (
        "error: hardware.nodes=2: this is no task of Slurm's. Add -m hydra/launcher=slurm, or give it to srun, one "
        "task a node: srun --nodes=2 --ntasks-per-node=1; each starts the ranks of its node\n"
    )
    assert not list(Path().iterdir())


def step(monkeypatch: pytest.MonkeyPatch, nodes: str, tasks: str) -> None:
    """This process is a task on the second of two nodes of a Slurm job."""
    slurm = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[0-1]", "NODEID": "1", "STEP_ID": "0"}
    for name, value in {**slurm, "STEP_NUM_NODES": nodes, "STEP_NUM_TASKS": tasks}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize(
    ("nodes", "tasks", "told"),
    [("2", "4", "srun began 4 tasks on 2 of this job's 2 nodes"), ("1", "1", "srun began 1 task on 1 of this job's 2")],
)
def test_a_step_has_one_task_on_each_node(nodes: str, tasks: str, told: str, monkeypatch: pytest.MonkeyPatch):
    """Another would wait for one that nobody starts, or for a port that its neighbour has."""
    step(monkeypatch, nodes, tasks)
    with pytest.raises(ConfigError, match=f"hardware.nodes=2: {told}"):
        Nodes.here(2)


def test_nodes_are_given_the_name_of_their_run(cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch):
    step(monkeypatch, nodes="2", tasks="2")
    assert cli(*PPO, "hardware.nodes=2") == 2
    assert capsys.readouterr().err == "error: hardware.nodes=2: set name=, or each node has one of its own\n"
    assert not list(Path().iterdir())


def test_a_chain_hands_its_hardware_to_every_stage(cli: Cli, capsys: pytest.CaptureFixture[str]):
    assert cli("run", "number_line", "hardware=zero2", "name=a") == 2
    assert "hardware.zero=2: stage=sft sums gradients without DeepSpeed; set hardware=ddp for it" in (
        capsys.readouterr().err
    )
    words = ["run", "number_line", "hardware=zero2", "hardware.device=cpu", "sft.hardware=ddp", "hardware.nodes=2"]
    assert cli(*words, "name=a") == 2
    assert "this is no task of Slurm's" in capsys.readouterr().err
