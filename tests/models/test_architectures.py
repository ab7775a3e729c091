"""Models from their dimensions alone are the published ones, by every parameter."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm_agents.config import HardwareConfig, ModelConfig, RunConfig
from vlm_agents.errors import ConfigError, ModelError
from vlm_agents.models import load_agent
from vlm_agents.models.architectures import tokenizer_for, whole_config
from vlm_agents.models.families import KINDS, family_of, kind_of
from vlm_agents.models.loading import TINY
from vlm_agents.models.processing import make_image_processor

Compose = Callable[..., RunConfig]
CPU = HardwareConfig("cpu")
PARAMETERS = {  # of the published safetensors files, a tied head counted once
    "qwen2_vl_2b": 2_208_985_600,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen3_vl_4b": 4_437_815_808,
    "llava_1_6_mistral_7b": 7_566_747_648,
}
TOKENS = {  # that a picture of 1024 by 768 pixels takes
    "qwen2_vl_2b": 37 * 27,  # 28 pixels a token each way: 1036 x 756
    "qwen2_5_vl_3b": 37 * 27,
    "qwen2_5_vl_7b": 37 * 27,
    "qwen3_vl_4b": 32 * 24,  # 32 pixels a token
    # 24 x 24 of the whole; 672 x 504 on 672 x 672: 48 x 48 patches less 6 rows above and below, a newline a row
    "llava_1_6_mistral_7b": 24 * 24 + 36 * (48 + 1),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_sizes(compose_run: Compose, name: str):
    cfg = compose_run("stage=eval", f"model={name}", "model.weights=random").model
    assert cfg.architecture
    kind = kind_of(cfg.architecture["model_type"])
    tokenizer = tokenizer_for(kind, AutoTokenizer.from_pretrained(str(TINY)))
    config = whole_config(cfg.architecture, kind, tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.get_input_embeddings().num_embeddings == cfg.architecture["text_config"]["vocab_size"]
    family = family_of(model, make_image_processor(kind, cfg.architecture["image_processor"]))
    assert family.image_tokens((1024, 768)) == TOKENS[name]
    assert tokenizer.convert_ids_to_tokens(family.image_token_id) in kind.token_ids.values()
    assert len(tokenizer) < cfg.architecture["text_config"]["vocab_size"]


def test_weights_must_come_from_somewhere(compose_run: Compose):
    with pytest.raises(ConfigError, match=r"model=tiny_llava has no weights of its own: set model\.path"):
        compose_run("stage=eval", "model=tiny_llava", "model.weights=pretrained")


def test_a_model_that_sees_nothing_is_refused_before_its_weights(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # and no weights
    with pytest.raises(ModelError, match="model_type=llama is no family known here") as caught:
        load_agent(ModelConfig("other", path=str(tmp_path)), CPU)
    assert all(kind in str(caught.value) for kind in KINDS)
    assert "transformers has no AutoModelForImageTextToText for it" in str(caught.value)
    assert "how many tokens a picture takes" in str(caught.value)
    with pytest.raises(ModelError, match="model_type=llama is no family"):
        load_agent(ModelConfig("other", weights="random", architecture={"model_type": "llama"}), CPU)


def test_wrong_dimensions_are_refused(compose_run: Compose):
    cfg = compose_run("stage=eval", "model=tiny_qwen2_vl", "model.architecture.text_config.hidden_size=wide").model
    with pytest.raises(ModelError, match=r"model tiny_qwen2_vl can't be loaded.*hidden_size"):
        load_agent(cfg, CPU)


def test_sliding_windows_are_refused(compose_run: Compose):
    cfg = compose_run("stage=eval", "model=tiny_llava", "model.architecture.text_config.sliding_window=64").model
    with pytest.raises(ModelError, match=r"sliding_window=null"):
        load_agent(cfg, CPU)


def test_a_text_model_whose_config_knows_no_windows(compose_run: Compose, tmp_path: Path):
    """Llama's, as vicuna's LLaVA-NeXT has it."""
    cfg = compose_run("stage=eval", "model=tiny_llava", "model.architecture.text_config.model_type=llama")
    load_agent(cfg.model, cfg.hardware).save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["text_config"].pop("sliding_window")  # which is there because the tiny twin's YAML has it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    agent = load_agent(ModelConfig("other", path=str(tmp_path)), cfg.hardware)
    assert not hasattr(agent.model.config.text_config, "sliding_window")


def test_a_saved_processor_knows_whether_the_vision_part_has_a_class_token(compose_run: Compose, tmp_path: Path):
    siglip = ("vision_config.model_type=siglip_vision_model", "vision_feature_select_strategy=full")
    for words, count in (((), 1), (siglip, 0)):
        cfg = compose_run("stage=eval", "model=tiny_llava", *(f"++model.architecture.{word}" for word in words))
        load_agent(cfg.model, cfg.hardware).save(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert saved["num_additional_image_tokens"] == count


def test_the_template_of_a_processor_wins(compose_run: Compose, tmp_path: Path):
    """Older checkpoints keep it in a file that tokenizers don't read; what the tokenizer has knows no pictures."""
    cfg = compose_run("stage=eval", "model=tiny_llava").model
    agent = load_agent(cfg, CPU)
    template = agent.tokenizer.chat_template
    agent.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    agent.save(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    again = load_agent(replace(cfg, path=str(tmp_path), weights="pretrained"), CPU)
    assert again.tokenizer.chat_template == template


def test_random_weights_have_no_trained_critic(compose_run: Compose):
    agent = load_agent(compose_run("stage=eval", "model=tiny", "model.weights=random").model, CPU)
    assert not any(parameter.any() for parameter in agent.value_head.net[-1].parameters())
