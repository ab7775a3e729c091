"""The doctor as a stage: what it writes down, and that its advice works and holds nothing superfluous."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from vlm_agents.config import DoctorConfig, RunConfig
from vlm_agents.errors import ConfigError
from vlm_agents.models.memory import ROOM, Work, blueprint, estimate
from vlm_agents.stages.advice import Estimates, advice, choice, share, words
from vlm_agents.stages.doctor import GIB, host_memory, memory_of, packages, work_of

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]
REAL = ("model=qwen2_5_vl_3b", "model.path=Qwen/Qwen2.5-VL-3B-Instruct")  # not in any cache here


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_it_says_what_fits(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = metrics_of(run_stage(tmp_path, "stage=doctor"))
    assert (tmp_path / "DONE").exists()
    assert metrics["doctor/fits"] == 1
    assert metrics["doctor/machine_bytes"] == host_memory()
    assert metrics["doctor/peak_bytes"] == max(metrics["doctor/update_bytes"], metrics["doctor/sampling_bytes"])
    assert metrics["doctor/optimizer_bytes"] == 2 * metrics["doctor/gradients_bytes"]
    shown = capsys.readouterr().out
    assert version("torch") in shown
    assert "It fits." in shown


def test_a_gpu_that_isnt_here(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = metrics_of(run_stage(tmp_path, "stage=doctor", "hardware=gpu", *REAL))
    assert (metrics["doctor/fits"], metrics["doctor/machine_bytes"]) == (0, 0)
    assert metrics["doctor/parameters"] == 3_754_622_976
    shown = capsys.readouterr().out
    assert "hardware.device=cuda isn't here." in shown
    assert [line.split(",")[0] for line in shown.splitlines() if "GiB, for" in line] == [
        "It doesn't fit 24 GiB", "It doesn't fit 48 GiB"
    ]  # fmt: skip
    assert "It fits 80 GiB." in shown
    # of 3.1 B trained parameters in the language part, 12 bytes each for an optimizer are 35 GiB
    small, large, node = (line for line in shown.splitlines() if line.startswith("On "))
    assert small.startswith("On 1 x 24 GiB: hardware=zero2 hardware.processes=1 hardware.offload=optimizer ")
    assert "of CPU memory" in small
    assert large.startswith("On 1 x 80 GiB: hardware=gpu (")
    assert node.startswith("On 8 x 80 GiB: hardware=ddp (")


def work_asked(cfg: RunConfig) -> Work:
    assert isinstance(cfg.stage, DoctorConfig)
    return work_of(cfg, cfg.stage, blueprint(cfg.model, cfg.hardware))


def test_a_given_length_of_prompts(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=doctor", "stage.prompt_tokens=1000", "prompt.max_reply_tokens=24")
    work = work_asked(cfg)
    assert (work.prompt, work.reply, work.rows) == (1000, 24, 8)  # 8 x 1024 tokens in a micro-batch of 8192
    assert work.picture_tokens > 0
    assert work.patches == 4 * work.picture_tokens  # Qwen merges 2 by 2


def test_no_more_is_asked_than_the_model_has_positions_for(
    run_stage: RunStage, echo_run: ComposeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The tiny model has 4096."""
    fits = echo_run(tmp_path, "stage=doctor", "stage.prompt_tokens=4092")
    assert work_asked(fits).prompt == 4092
    words = ["stage=doctor", "stage.prompt_tokens=4093", "prompt.max_reply_tokens=4"]
    with pytest.raises(ConfigError, match=r"^stage.prompt_tokens=4093 and .*: that is 4097 tokens, .* for 4096\."):
        run_stage(tmp_path / "refused", *words)
    assert "It fits" not in capsys.readouterr().out


def test_prompts_are_as_long_as_a_run_would_have_them(echo_run: ComposeRun, tmp_path: Path):
    """Cut to their budget, where a chat of 4 turns would be some 50 tokens a turn."""
    words = ["stage=doctor", "env.turns=4", "prompt.history=full"]
    cut, whole = (
        work_asked(cfg)
        for cfg in (echo_run(tmp_path, *words, "prompt.max_prompt_tokens=120"), echo_run(tmp_path, *words))
    )
    assert cut.prompt <= 120 < whole.prompt
    assert whole.continued
    assert not work_asked(echo_run(tmp_path, "stage=doctor", "env.turns=4")).continued


def test_where_there_are_no_random_moves_prompts_are_the_experts(compose_run: ComposeRun):
    """Those of its later turns, with what Python showed it, are longer than the first."""
    words = ("stage=doctor", "env=visual_search", "env.level=tiny", "prompt=tool_call")
    played, first = (work_asked(compose_run(*words, *more)) for more in ((), ("env.picture_in=runtime",)))
    assert played.prompt > first.prompt
    assert played.picture_tokens > first.picture_tokens == 0  # in Python alone: no expert plays that, nothing is shown


def test_the_advice_fits_and_none_of_it_is_spare(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=doctor", "stage.num_envs=16", "env=minigrid")
    work = work_asked(cfg)

    def peak(tokens: int, checkpointing: bool, dtype: str) -> float:
        model, hardware = replace(cfg.model, gradient_checkpointing=checkpointing), replace(cfg.hardware, dtype=dtype)
        agent = blueprint(model, hardware)
        return ROOM * estimate(agent, replace(work, microbatch=tokens), "cpu").peak

    whole = int(peak(8192, False, "float32"))
    estimates = Estimates()

    def advised(there: int) -> list[str]:
        return words(advice(cfg, work, there, estimates))

    assert advised(whole - 1) == ["hardware.tokens_per_microbatch=4096"]
    least = int(peak(1024, False, "float32"))
    assert advised(least + 1) == ["hardware.tokens_per_microbatch=1024"]
    assert "hardware.dtype=bfloat16" in advised(int(0.7 * least))
    assert advised(1000) == []


def test_packages_that_are_absent_come_with_their_line():
    found = {name: rest for name, *rest in packages()}
    assert found["torch"][0] == version("torch")  # torch.__version__ may have more, as in 2.11.0+cu130
    assert all("pip install" in line for line, _ in found.values() if line.startswith("absent"))


def test_the_advice_goes_as_far_as_four_bits(echo_run: ComposeRun, tmp_path: Path):
    """3.8 B parameters are 7 GiB in bfloat16, more than there is."""
    cfg = echo_run(
        tmp_path, "stage=doctor", "hardware=gpu", *REAL, "hardware.tokens_per_microbatch=1024", "stage.num_envs=4"
    )
    taken = words(advice(cfg, work_asked(cfg), 7 * GIB, Estimates()))
    assert {"model/lora=adapter", "model.quantize=nf4"} <= set(taken)


def test_the_cache_is_a_ranks_share(echo_run: ComposeRun, tmp_path: Path):
    """10 envs on 4 ranks: 3 at most are one rank's. Lengths and micro-batches aren't divided."""
    cfg = echo_run(tmp_path, "stage=doctor", "hardware.processes=2", "hardware.nodes=2", "stage.num_envs=10")
    work = work_asked(cfg)
    assert share(work, cfg) == replace(work, num_envs=3)
    alone = estimate(blueprint(cfg.model, cfg.hardware), work, "cpu")
    assert Estimates().need(cfg, work).kv_cache * 10 == alone.kv_cache * 3


def test_ranks_on_one_cpu_share_its_memory(echo_run: ComposeRun, tmp_path: Path):
    cfg = echo_run(tmp_path, "stage=doctor", "hardware.processes=2")
    assert memory_of(cfg.hardware) == host_memory() // 2
    assert memory_of(replace(cfg.hardware, device="cuda", processes=64)) == 0  # a machine with fewer GPUs


def test_the_hardware_of_a_machine(echo_run: ComposeRun, tmp_path: Path):
    """3.1 B trained of 3.8 B parameters, in GiB: weights 7, gradients 6, optimizer 34, its step 23, activations
    and logits 26. With a tenth of room that is 81, and on 8 GPUs 45 with zero=2, and 42 with zero=3:
    an eighth of the weights, but all of the 1.2 that see, which are frozen."""
    cfg = echo_run(tmp_path, "stage=doctor", "hardware=gpu", *REAL, "stage.num_envs=64")
    work = Work(64, prompt=140, reply=96, patches=144, picture_tokens=36, microbatch=4096)
    estimates = Estimates()

    def asks(gpus: int, gibs: int) -> str:
        found = choice(cfg, work, gpus, gibs * GIB, estimates)
        return found.words if found else ""

    assert asks(1, 100) == "hardware=gpu"
    assert asks(8, 100) == "hardware=ddp"
    assert asks(8, 60) == "hardware=zero2"  # a rank has an eighth of gradients, optimizer and step
    assert asks(8, 43) == "hardware=zero3"  # and of the weights that learn, in an update
    assert asks(4, 50) == "hardware=zero3 hardware.processes=4"
    assert asks(1, 50) == "hardware=zero2 hardware.processes=1 hardware.offload=optimizer"
