"""What a saved folder needs so that transformers 4.57 reads it; that it does is shown by benchmarks/interchange.py."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, RunConfig
from vlm_agents.models import Agent, load_agent


def test_settings_have_their_older_names_too_and_read_back_the_same(agent: Agent, tmp_path: Path):
    agent.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 30.0
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [4, 6, 6]}
    assert config["vocab_size"] == text["vocab_size"]
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    assert "extra_special_tokens" not in tokenizer  # version 4 takes a dictionary there, and fails with a list

    again = load_agent(ModelConfig("any", path=str(tmp_path)), HardwareConfig("cpu"))
    first, second = (each.model.config.get_text_config().rope_parameters for each in (agent, again))
    assert first == second
    assert again.tokenizer.all_special_tokens == agent.tokenizer.all_special_tokens


def test_an_adapter_has_no_config_to_change(tiny_folder: Path, tmp_path: Path):
    cfg = ModelConfig("any", path=str(tiny_folder), lora=LoraConfig(rank=2))
    load_agent(cfg, HardwareConfig("cpu")).save(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert "additional_special_tokens" in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_drawn_weights_are_saved_under_the_names_of_the_hub(compose_run: Callable[..., RunConfig], tmp_path: Path):
    """As a model from the hub is: version 4 would draw a vision tower with other names at random."""
    load_agent(compose_run("stage=eval", "model=tiny_llava").model, HardwareConfig("cpu")).save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        seeing = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
    assert seeing
    assert all(name.startswith("vision_tower.vision_model.") for name in seeing)
    load_agent(ModelConfig("any", path=str(tmp_path)), HardwareConfig("cpu"))  # refuses what lacks a tensor
