"""DeepSpeed's ZeRO beside the engine that divides nothing: two ranks, of which each is a process (zero_ranks.py)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each rank imports DeepSpeed, and makes dozens of models
SCRIPT = Path(__file__).with_name("zero_ranks.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(ranks: int, folder: Path, *parts: str) -> dict[str, Any]:
    """What the parts of zero_ranks.py found."""
    words = [str(free_port()), str(folder), *parts]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(ranks), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=800)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    for line in said:  # nothing of DeepSpeed's own
        assert "Warning" not in line
        assert "[INFO]" not in line
    return json.loads((folder / f"found_by_{ranks}.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All figures of all parts."""
    folder = tmp_path_factory.mktemp("zero")
    return run_ranks(2, folder, "equality", "resuming", "the_rest") | run_ranks(1, folder, "alone")


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("case", ["full", "lora", "qlora", "llava"])
def test_two_ranks_learn_what_one_does(found: dict[str, Any], case: str, zero: int) -> None:
    figures, weights = found[f"{case} {zero}"]
    assert figures < 1e-5  # a norm over a whole weight in fp32 has an error of its own
    assert weights < 1e-5


@pytest.mark.parametrize("zero", [2, 3])
def test_state_continues_bit_for_bit(found: dict[str, Any], zero: int) -> None:
    assert found[f"resumed {zero}"] == [True, True, True]  # weights when loaded; figures and weights 3 steps later


@pytest.mark.parametrize("zero", [2, 3])
def test_state_is_the_same_for_another_stage_and_for_one_rank(found: dict[str, Any], zero: int) -> None:
    assert found[f"from {zero} to {5 - zero}"]
    assert found[f"alone {zero}"]
    assert found[f"alone {zero}, later"] < 1e-4  # Adam's second means are squares, with twice the error


@pytest.mark.parametrize("zero", [2, 3])
def test_a_norm_that_is_not_finite_on_one_rank_leaves_the_weights_alone_on_all(
    found: dict[str, Any], zero: int
) -> None:
    assert found[f"not finite {zero}"] == [False, True]
    assert found[f"goes on {zero}"]


@pytest.mark.parametrize("zero", [2, 3])
def test_whole_weights_sample_and_are_saved_as_undivided_ones(found: dict[str, Any], zero: int) -> None:
    assert found[f"sampled {zero}"]
    assert found[f"saved {zero}"] < 1e-5


@pytest.mark.parametrize("zero", [2, 3])
def test_offload_changes_nothing_and_bfloat16_rounds_alone(found: dict[str, Any], zero: int) -> None:
    assert max(found[f"offload {zero}"]) < 1e-5
    assert max(found[f"bf16 {zero}"]) < 0.02  # of 8 bits, 2 to 4 times
