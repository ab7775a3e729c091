"""The settings file of an adapter: what is taken does what peft does, what is refused, and how ours is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from vlm_agents.config import LoraConfig
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent
from vlm_agents.tensors import Row
from vlm_agents.types import Prompt

Load = Callable[..., Agent]
SMALL = LoraConfig(rank=4, alpha=8)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def put(folder: Path, **values: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings(folder) | values))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"task_type": None},  # then peft writes auto_mapping, which only its own AutoPeftModel reads
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.2.self_attn.q_proj": 32}},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"exclude_modules": r".*layers\.0\..*"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda extra: ",".join(extra) or "plain",
)
def test_a_plain_adapter_of_peft_says_here_what_it_says_there(
    load: Load, chats: list[Prompt], make_row: Callable[..., Row], tmp_path: Path, extra: dict[str, Any]
):
    base = load()
    base_logprobs = base.score([make_row(base, chats[0], [30, 31, 2])]).logprobs
    words = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | extra
    foreign = get_peft_model(base.model, PeftLoraConfig(r=4, lora_alpha=8, **words))
    torch.manual_seed(0)
    for name, parameter in foreign.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    foreign.save_pretrained(str(tmp_path))
    assert bool(settings(tmp_path)["auto_mapping"]) == (words["task_type"] is None)
    ours, theirs = load(init=tmp_path, lora=SMALL), load()
    theirs.model = PeftModel.from_pretrained(theirs.model, str(tmp_path))
    with torch.no_grad():
        found, expected = (one.score([make_row(one, chats[0], [30, 31, 2])]).logprobs for one in (ours, theirs))
    assert torch.equal(found, expected)
    assert (found - base_logprobs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.w"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "payload_of_an_adapter.core"),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"cache_file": "x"}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("revision", "v2"),
        ("of_a_later_peft", 3),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(load: Load, tmp_path: Path, key: str, value: Any):
    get_peft_model(load().model, PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path)
    )
    put(tmp_path, **{key: value})
    with pytest.raises(
        ModelError, match=rf"adapter_config\.json has {key}=.* isn't read here: merge .* set model\.path"
    ):
        load(init=tmp_path, lora=SMALL)


def test_settings_of_wrong_types_are_one_line(load: Load, tmp_path: Path):
    load(lora=SMALL).save(tmp_path)
    whole = settings(tmp_path)
    for key, value in {
        "r": "4",
        "lora_alpha": None,
        "lora_dropout": None,
        "target_modules": 3,
        "rank_pattern": [1],
        "base_model_name_or_path": 5,
    }.items():
        put(tmp_path, **(whole | {key: value}))
        with pytest.raises(ModelError, match=rf"adapter_config\.json has {key}=.*, of another type: put a whole copy"):
            load(init=tmp_path, lora=SMALL)
    put(tmp_path, **(whole | {"task_type": "FORTUNE"}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: Invalid task type"):
        load(init=tmp_path, lora=SMALL)


def test_no_module_that_an_adapter_names_is_imported(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "payload_of_an_adapter.py").write_text("raise SystemExit('foreign code')")
    monkeypatch.syspath_prepend(str(tmp_path))
    load(lora=SMALL).save(tmp_path / "adapter")
    put(tmp_path / "adapter", auto_mapping={"parent_library": "payload_of_an_adapter", "base_model_class": "A"})
    load(init=tmp_path / "adapter", lora=SMALL)
    put(tmp_path / "adapter", megatron_core="payload_of_an_adapter", megatron_config={"a": 1})
    with pytest.raises(ModelError, match=r"megatron_config=.*megatron_core="):
        load(init=tmp_path / "adapter", lora=SMALL)
    assert "payload_of_an_adapter" not in sys.modules


def test_lists_are_sorted(load: Load, tmp_path: Path):
    """peft has them as sets, whose order differs by process."""
    load(lora=SMALL).save(tmp_path)
    targets = settings(tmp_path)["target_modules"]
    assert targets == sorted(targets)


def test_a_base_by_a_relative_path_is_found_from_elsewhere(
    load: Load, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tiny_folder.parent)
    load(path=tiny_folder.name, lora=SMALL).save(tmp_path / "adapter")
    assert settings(tmp_path / "adapter")["base_model_name_or_path"] == str(tiny_folder.resolve())
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load(init=tmp_path / "adapter", path=None, lora=SMALL)
    assert os.path.samefile(again.model.name_or_path, tiny_folder)


def test_the_shipped_base_is_named_by_the_package_that_ships_it(load: Load, tmp_path: Path):
    """Older versions wrote its absolute path, of whatever machine."""
    load(path=None, lora=SMALL).save(tmp_path)
    assert settings(tmp_path)["base_model_name_or_path"] == "vlm_agents/models/tiny_weights"
    assert not (tmp_path / "README.md").exists()  # peft's, with that machine's path
    load(init=tmp_path, path=None, lora=SMALL)
    put(tmp_path, base_model_name_or_path="/elsewhere/site-packages/vlm_agents/models/tiny_weights")
    load(init=tmp_path, path=None, lora=SMALL)


def test_a_base_in_the_project_is_named_by_its_place_there_and_found_when_the_project_moves(
    load: Load, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From within it and from elsewhere, also where the working directory has another folder of that name."""
    project, other = tmp_path / "project", tmp_path / "other"
    shutil.copytree(tiny_folder, project / "outputs/base/model")
    (other / "outputs/base/model").mkdir(parents=True)
    monkeypatch.chdir(project)
    load(path="outputs/base/model", lora=SMALL).save(project / "outputs/adapted")
    assert settings(project / "outputs/adapted")["base_model_name_or_path"] == "outputs/base/model"
    moved = project.rename(tmp_path / "moved")
    for place in (moved, other):
        monkeypatch.chdir(place)
        again = load(init=moved / "outputs/adapted", path=None, lora=SMALL)
        assert os.path.samefile(again.model.name_or_path, moved / "outputs/base/model")
    monkeypatch.chdir(moved)  # the adapter alone goes elsewhere
    away = (moved / "outputs/adapted").rename(tmp_path / "away")
    load(init=away, path=None, lora=SMALL)
