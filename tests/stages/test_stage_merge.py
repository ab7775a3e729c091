"""Merging as a stage: the merged folder says what the adapter model says, here and in plain transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlm_agents.config import LoraConfig, RunConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.stages import merge
from vlm_agents.stages.playing import first_prompts, open_envs
from vlm_agents.types import Prompt, Reply, Sampling

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]
MODELS = ["tiny", "tiny_qwen2_vl", "tiny_qwen3_vl", "tiny_llava"]
LORA = ("model/lora=adapter", "model.lora.rank=4", "model.lora.alpha=8")


def agent_of(cfg: RunConfig, init: Path | None = None, lora: LoraConfig | None = None) -> Agent:
    return load_agent(replace(cfg.model, lora=lora), cfg.hardware, str(init) if init else None)


@pytest.fixture(scope="session")
def adapter(echo_run: ComposeRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunConfig, Path]]:
    """`adapter(model)`: a run directory with an adapter of that model that has something to say; a critic, too."""
    made: dict[str, tuple[RunConfig, Path]] = {}

    def make(model: str) -> tuple[RunConfig, Path]:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            cfg = echo_run(folder, "stage=eval", "env=minigrid", f"model={model}", *LORA)
            torch.manual_seed(1)  # before it is loaded: half of a fresh adapter is drawn at random
            agent = agent_of(cfg, lora=cfg.model.lora)
            for name, parameter in agent.named_parameters():
                if "lora_B" in name or "value_head" in name:
                    nn.init.normal_(parameter, std=0.05)
            agent.save(folder / "model")
            made[model] = cfg, folder
        return made[model]

    return make


@pytest.fixture(scope="session")
def merged(adapter, run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`merged(model)`: the finished stage=merge of `adapter(model)`."""
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp(f"merged_{model}")
            words = ("stage=merge", "env=minigrid", f"stage.init={adapter(model)[1]}", f"model={model}")
            made[model] = run_stage(folder, *words)
        return made[model]

    return make


def greedy(agent: Agent, prompts: list[Prompt], tokens: int) -> list[Reply]:
    rngs = [np.random.default_rng(0) for _ in prompts]
    return HFSampler(agent).generate(prompts, rngs, Sampling(tokens, greedy=True))


@pytest.mark.parametrize("model", MODELS)
def test_the_merged_model_is_the_adapter_model(adapter, merged, model: str):
    cfg, source = adapter(model)
    folder = merged(model)
    with open_envs(cfg.env, 100, "never") as envs:
        prompts = first_prompts(cfg, envs, 100)
    assert len({prompt[-1].images[0].key for prompt in prompts}) > 90  # DoorKey is laid out anew for every seed
    before = greedy(agent_of(cfg, source, cfg.model.lora), prompts, 8)
    after = greedy(agent_of(cfg, folder), prompts, 8)
    base = greedy(agent_of(cfg), prompts, 8)
    assert [reply.text for reply in after] == [reply.text for reply in before]
    assert sum(one.text != other.text for one, other in zip(base, before, strict=True)) > 50  # the adapter matters
    for one, other in zip(before, after, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)  # the critic came along
        assert abs(one.value or 0.0) > 1e-3
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert 0 < metrics["merge/max_logit_difference"] < 1e-4
    assert metrics["merge/adapter_logit_difference"] > 0.1
    assert not (folder / "model/adapter_config.json").exists()


PLAIN = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
said = []
for case in json.load(sys.stdin):
    model, report = AutoModelForImageTextToText.from_pretrained(case["folder"], output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    picture = Image.open(case["picture"])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.count(case["image_token"]) == 1, text
    ids = torch.tensor([case["ids"]])
    inputs = AutoImageProcessor.from_pretrained(case["folder"])(images=[picture], return_tensors="pt")
    if case["kind"] == "llava_next":  # the processors of Qwen need torchvision
        processor = AutoProcessor.from_pretrained(case["folder"])
        count = processor(images=[picture], text=text, return_tensors="pt")["input_ids"].eq(model.config.image_token_id)
        assert int(count.sum()) == int(ids.eq(model.config.image_token_id).sum())
    else:
        inputs["mm_token_type_ids"] = ids.eq(model.config.image_token_id).int()
    out = model.generate(ids, **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=case["banned"])
    said.append(out[0, ids.shape[1]:].tolist())
assert not any(name.startswith("vlm_agents") for name in sys.modules)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_plain_transformers_says_the_same(adapter, merged, tmp_path: Path):
    """In a process of its own, without this package."""
    cases, expected = [], []
    for model in MODELS:
        cfg, source = adapter(model)
        agent = agent_of(cfg, source, cfg.model.lora)
        with open_envs(cfg.env, 1, "never") as envs:
            (prompt,) = first_prompts(cfg, envs, 1)
        reply = greedy(agent, [prompt], 8)[0]
        expected.append(list(reply.token_ids))
        picture = tmp_path / f"{model}.png"
        prompt[-1].images[0].image.save(picture)
        cases.append(
            {
                "folder": str(merged(model) / "model"),
                "kind": agent.model.config.model_type,
                "picture": str(picture),
                "ids": list(reply.prompt_token_ids),
                "image_token": agent.renderer.image_token,
                "banned": agent.banned.nonzero().flatten().tolist(),
            }
        )
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_no_other_weights_lie_where_servers_look(merged):
    """They read every *.safetensors beside config.json."""
    folder = merged("tiny") / "model"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not any("lora" in name or "base_layer" in name for name in load_file(folder / "model.safetensors"))
    assert (folder / "heads/value_head.safetensors").is_file()


def test_training_goes_on_from_the_merged_model(merged, run_stage: RunStage, tmp_path: Path):
    """A fresh adapter on the merged weights, with the critic: a learning rate of 0 gives it back as it was."""
    words = ["stage=ppo", "stage.episodes=4", "stage.num_envs=4", "stage.eval_episodes=0", "stage.iterations=1"]
    init = f"stage.init={merged('tiny')}"
    folder = run_stage(tmp_path, *words, "model=tiny", init, "algo.lr=0", "algo.value_lr=0")
    for name in ("model", "heads/value_head"):
        before, after = (load_file(one / f"model/{name}.safetensors") for one in (merged("tiny"), folder))
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_without_a_family_is_merged_too(run_stage: RunStage, llava_folder: Path, tmp_path: Path):
    words = (f"model.path={llava_folder}", "prompt.max_reply_tokens=3")
    few = ("stage.episodes=3", "stage.num_envs=3", "stage.iterations=1", "stage.eval_episodes=0", "algo.lr=1e-2")
    trained = run_stage(tmp_path / "ppo", "stage=ppo", *words, *few, *LORA)
    folder = run_stage(tmp_path / "merge", "stage=merge", *words, f"stage.init={trained}")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["merge/max_logit_difference"] < 1e-3 < metrics["merge/adapter_logit_difference"]
    stock, saved = (json.loads((f / "processor_config.json").read_text()) for f in (llava_folder, folder / "model"))
    assert saved["num_additional_image_tokens"] == stock["num_additional_image_tokens"] == 1
    assert saved["processor_class"] == "LlavaProcessor"


def test_bfloat16_keeps_its_dtype(adapter, run_stage: RunStage, tmp_path: Path):
    words = ["stage=merge", f"stage.init={adapter('tiny')[1]}", "model=tiny", "hardware.dtype=bfloat16"]
    folder = run_stage(tmp_path, *words)
    assert {tensor.dtype for tensor in load_file(folder / "model/model.safetensors").values()} == {torch.bfloat16}
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert 1e-3 < metrics["merge/max_logit_difference"] < 0.5


def test_the_model_in_4_bits_is_compared_too(
    adapter, run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["stage=merge", f"stage.init={adapter('tiny')[1]}", "model=tiny", *LORA, "model.quantize=nf4"]
    metrics = json.loads((run_stage(tmp_path, *words) / "summary.json").read_text())["metrics"]
    assert metrics["merge/max_logit_difference"] < 1e-4 < 1e-2 < metrics["merge/quantised_logit_difference"]
    assert (
        f"in 4 bits that was trained, by {metrics['merge/quantised_logit_difference']:.2g}" in capsys.readouterr().err
    )


def test_the_base_of_a_merged_model_is_no_base_of_its_adapter(
    run_stage: RunStage, echo_chats: Path, tiny_model: Path, tmp_path: Path
):
    """An adapter on a merged model, which has since moved: the weights under that one differ by an adapter alone."""
    sft = ("stage=sft", f"stage.data={echo_chats}", "stage.batch_size=16", "stage.warmup_steps=0", "stage.lr=1e-2")
    first = run_stage(tmp_path / "first", *sft, "stage.epochs=1", *LORA)
    merged = run_stage(tmp_path / "merged", "stage=merge", f"stage.init={first}", "env=minigrid") / "model"
    assert json.loads((tmp_path / "merged/summary.json").read_text())["env"] == "vlm_agents/Echo-v0"  # of the data
    assert "An agent for vlm_agents/Echo-v0" in (merged / "README.md").read_text()
    second = run_stage(tmp_path / "second", *sft, "stage.epochs=1", *LORA, f"model.path={merged}")
    merged.rename(tmp_path / "moved")
    message = (
        rf"was trained on other weights than these: \d+ tensors differ from those of {merged}, model\..*proj.* for one"
        rf"\. Find those: set model\.path to where {merged} lies now\. Random weights .* by model\.weights, model\.seed"
    )
    for name, words in {
        "eval": ("stage.episodes=2", *LORA),
        "merge": (),
        "quantised": (*LORA, "model.quantize=nf4"),
    }.items():
        stage = "stage=eval" if name == "eval" else "stage=merge"
        with pytest.raises(ModelError, match=message):
            run_stage(tmp_path / name, stage, f"stage.init={second}", f"model.path={tiny_model}", *words)
    words = ("stage=merge", f"stage.init={second}", f"model.path={tmp_path / 'moved'}")
    assert (run_stage(tmp_path / "right", *words) / "DONE").exists()


def test_only_lora_is_merged(run_stage: RunStage, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match=r"adapter_config\.json has peft_type=IA3"):
        run_stage(tmp_path / "run", "stage=merge", f"stage.init={tmp_path}", "model=tiny")


def test_a_run_of_the_same_name_is_merged(compose_run: ComposeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = "stage=merge", "name=mine", "run_dir=outputs/mine/merge"
    assert getattr(compose_run(*words).stage, "init", None) == "outputs/mine/ppo"  # which isn't there: told later
    folder = Path("outputs/mine/sft")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: {name: sft}\n")
    (folder / "DONE").touch()
    assert getattr(compose_run(*words).stage, "init", None) == "outputs/mine/sft"


def test_whole_weights_have_nothing_to_merge(merged, run_stage: RunStage, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds whole weights and no adapter, so there is nothing to merge"):
        run_stage(tmp_path, "stage=merge", f"stage.init={merged('tiny')}", "model=tiny")
    assert not (tmp_path / "DONE").exists()


def test_a_merge_that_went_wrong_is_refused(
    adapter, run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As if half of an adapter were lost on the way."""

    def save_half(agent: Agent, folder: Path) -> None:
        for name, parameter in agent.model.named_parameters():
            if "lora_B" in name and "layers.1." in name:
                nn.init.zeros_(parameter)
        whole(agent, folder)

    whole = merge.save_merged
    monkeypatch.setattr(merge, "save_merged", save_half)
    with pytest.raises(ModelError, match=r"logits differ by .*, more than 0\.001.*hardware\.dtype=float32"):
        run_stage(tmp_path, "stage=merge", f"stage.init={adapter('tiny')[1]}", "model=tiny")
    assert not (tmp_path / "DONE").exists()
    assert not (tmp_path / "model").exists()  # nothing that a later stage would take for a model


def test_no_number_is_no_likeness(tmp_path: Path):
    found = torch.tensor([[1.0, 2.0], [1.0, torch.nan]])
    with pytest.raises(ModelError, match="held-out seed number 1"):
        merge.compare(torch.ones(2, 2), found, 1e9, tmp_path, "echo")
    assert merge.compare(torch.ones(2, 2), found.nan_to_num(nan=3.5), 1e9, tmp_path, "echo") == 2.5
