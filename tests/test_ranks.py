"""Several ranks do what one does: what they tell each other (world_ranks.py), and a whole run."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm_agents import world
from vlm_agents.config import RunConfig
from vlm_agents.launch import Job
from vlm_agents.world import ALONE, buckets

RUN = ("stage=ppo", "env=echo", "env.turns=2", "model=tiny", "prompt=action_only", "prompt.max_reply_tokens=3")
RUN += ("stage.iterations=3", "stage.episodes=6", "stage.num_envs=4", "stage.eval_episodes=2", "algo.minibatch_turns=6")
RUN += (
    "algo.lr=1e-5",
    "algo.count_coef=0.5",
    "hardware.threads=1",
    "tracking=jsonl",
)  # turns differ in that bonus


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("world_ranks.py")
    command = [sys.executable, str(script), str(free_port()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranks_know_what_each_other_found(told: list[dict[str, Any]]) -> None:
    for rank, its in enumerate(told):
        assert its["gathered"] == ["rank 0", "rank 1"]
        assert its["any"] == [False, True]
        assert its["of rank 0"] == 0
        assert its["shared"] == [[0, 2, 4], [1, 3]][rank]


def test_a_checkpoint_holds_what_all_ranks_wrote(told: list[dict[str, Any]]) -> None:
    for its in told:
        assert Path(its["checkpoint"]["at"]).parts[-2:] == ("0", "step_000003")  # in the folder that rank 0 gave
        assert its["checkpoint"]["files"] == ["0", "1", "state.json"]
        assert its["checkpoint"]["whole"]


def test_ranks_add_tensors_in_buckets(told: list[dict[str, Any]]) -> None:
    for its in told:
        assert its["added"] == [[3.0] * size for size in (3, 4, 1, 9, 2)]  # 1 + 2


def test_what_ranks_find_comes_back_in_the_order_of_parts(told: list[dict[str, Any]]) -> None:
    # dealt longest first to whoever has least: 7 to rank 0; 5 and 3 to rank 1; 1 to rank 0, padded to 7 too much for 8
    for its in told:
        assert its["by part"] == [[5, 1, 0], [3, 1, 1], [7, 0, 0], [1, 0, 1]]


def test_buckets_hold_all_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "BUCKET_BYTES", 8 * 4)
    sizes = [[len(tensor) for tensor in bucket] for bucket in buckets([torch.zeros(size) for size in (3, 4, 1, 9, 2)])]
    assert sizes == [[3, 4, 1], [9], [2]]
    assert list(buckets([])) == []


def test_one_rank_asks_nobody() -> None:
    assert (ALONE.gather(1), ALONE.any(True), ALONE.of_main(lambda: 2), ALONE.share([1, 2])) == ([1], True, 2, [1, 2])


PARENT = "import subprocess, sys; print((one := subprocess.Popen(sys.argv[1:])).pid, flush=True); one.wait()"


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system to tell it of its parent's end")
def test_a_rank_ends_with_a_launcher_that_was_killed(
    compose_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for the other, who never comes."""
    note, port = tmp_path / "job", free_port()
    note.write_bytes(pickle.dumps(Job(compose_run("stage=ppo", "env=echo", "hardware.processes=2"), [], None)))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    command = [sys.executable, "-c", PARENT, sys.executable, "-m", "vlm_agents.worker", str(note)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        rank = int(parent.stdout.readline())
        with socket.socket() as visitor:
            until(lambda: visitor.connect_ex(("127.0.0.1", port)) == 0)
        parent.kill()
    until(lambda: not Path(f"/proc/{rank}/cmdline").exists() or not Path(f"/proc/{rank}/cmdline").read_bytes())


def learned(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Each line of a run's metrics but for the clock, and its weights."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = "time/", "speed/"
    figures = [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]
    return figures, load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_of_zero_3_run_as_one_does(cli: Callable[..., int]) -> None:
    assert cli(*RUN, "name=one") == 0
    assert cli(*RUN, "name=two", "hardware.processes=2", "hardware.zero=3") == 0
    (wanted, weights), (found, its) = (learned(Path(f"outputs/{name}/ppo")) for name in ("one", "two"))
    for line, other in zip(found, wanted, strict=True):
        ratios = [one.pop("ppo/ratio_at_start", 1.0) for one in (line, other)]  # the furthest of roundings of 1
        assert ratios == pytest.approx([1.0, 1.0], abs=1e-4)
        # a policy loss is a mean of advantages of order 1 that cancel: what is left of it is their rounding
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert [line["ppo/policy_grad_norm"] > 0.1 for line in found if line.get("ppo/updates")] == [True, True]
    for name, tensor in weights.items():
        assert (its[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
