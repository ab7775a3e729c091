"""The five stages, one after the other, with each family at tiny size, and with one of them quantised."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

RunStage = Callable[..., Path]
MODES = {"full": (), "qlora": ("model/lora=adapter", "model.lora.dropout=0.1", "model.quantize=nf4")}


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("tiny", "full"),
        ("tiny_qwen2_vl", "full"),
        ("tiny_qwen3_vl", "full"),
        ("tiny_llava", "full"),
        ("unlisted", "full"),
        ("tiny", "qlora"),
        ("unlisted", "qlora"),
    ],
)
def test_the_five_stages_follow_each_other(
    run_stage: RunStage, llava_folder: Path, tmp_path: Path, name: str, mode: str
):
    """`unlisted` is a LLaVA-1.5, which has no family of its own."""
    model = (f"model={name}", "model.path=null") if name != "unlisted" else (f"model.path={llava_folder}",)
    few = ("stage.episodes=3", "stage.num_envs=3")

    def run(stage: str, *words: str) -> Path:
        of_run = (f"stage={stage}", *model, "env.turns=2", "prompt.max_reply_tokens=3")
        return run_stage(tmp_path / stage, *of_run, *MODES[mode], *words)

    played = run("collect", *few, "stage.policy=model")
    chats = run("preprocess", f"stage.data=[{played}]", "stage.label=advice", "stage.success_only=false")
    cloned = run("sft", f"stage.data={chats}", "stage.batch_size=3")
    assert (cloned / "model/adapter_config.json").exists() is (mode == "qlora")
    trained = run("ppo", *few, f"stage.init={cloned}", "stage.iterations=1", "stage.eval_episodes=0", "algo.epochs=2")
    assert metrics_of(trained)["ppo/ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
    assert metrics_of(trained)["ppo/updates"] == 2
    assert "eval/success" in metrics_of(run("eval", *few, f"stage.init={trained}", "stage.baselines=false"))
