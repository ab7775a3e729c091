from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig, RunConfig
from vlm_agents.errors import ConfigError
from vlm_agents.models import Agent, load_agent

LARGE = (1120, 840)  # pixels; at 28 by 28 of them a token: 40 * 30 tokens


def test_pictures_have_a_bound_that_stays_with_the_model(load: Callable[..., Agent], tmp_path: Path):
    """Whole weights, and an adapter, whose base has its own."""
    assert load().family.image_tokens(LARGE) == 40 * 30
    for name, lora in (("whole", None), ("adapter", LoraConfig(rank=2, alpha=4))):
        bounded = load(image_processor={"max_pixels": 28 * 28 * 100}, lora=lora)
        # the largest multiples of 28 within 100 * 28 * 28 pixels at 4 : 3, which is 11.5 by 8.7 tokens
        assert bounded.family.image_tokens(LARGE) == 11 * 8
        bounded.save(tmp_path / name)
        assert load(init=tmp_path / name, lora=lora).family.image_tokens(LARGE) == 11 * 8
    again = load(init=tmp_path / "whole", image_processor={"max_pixels": 28 * 28 * 25})
    assert again.family.image_tokens(LARGE) == 5 * 4


@pytest.mark.parametrize(
    ("model", "settings", "tokens"),
    [
        ("tiny_qwen2_vl", "{max_pixels: 78400}", 11 * 8),
        ("tiny_qwen3_vl", "{size: {shortest_edge: 784, longest_edge: 78400}}", 11 * 8),
        # 3 x 3 patches of the whole, and of 84 x 168 pixels: 3 x 6, of which 4 : 3 leaves 2 rows less, a newline a row
        ("tiny_llava", "{image_grid_pinpoints: [[84, 168]]}", None),
    ],
)
def test_every_family_has_a_bound(compose_run: Callable[..., RunConfig], model: str, settings: str, tokens: int | None):
    def load_with(*words: str) -> Agent:
        cfg = compose_run("stage=eval", f"model={model}", *words)
        return load_agent(cfg.model, HardwareConfig("cpu"))

    free, bounded = load_with(), load_with(f"model.image_processor={settings}")
    assert bounded.family.image_tokens(LARGE) < free.family.image_tokens(LARGE)
    assert tokens is None or bounded.family.image_tokens(LARGE) == tokens


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_pixel": 784}, "max_pixel: Qwen2VLImageProcessorPil knows no such setting. Did you mean 'max_pixels'?"),
        ({"return_tensors": "pt"}, "return_tensors: Qwen2VLImageProcessorPil knows no such setting"),
        ({"patch_size": 16}, "doesn't go with this model"),
        ({"merge_size": 4}, "doesn't go with this model"),
        ({"max_pixels": "many"}, "model.image_processor={'max_pixels': 'many'}"),
        ({"max_pixels": 784}, "bounds pictures between 3136 and 784 pixels: set min_pixels and max_pixels"),
        ({"crop_size": 56}, "crop_size: Qwen2VLImageProcessorPil knows no such setting"),  # taken, and never read
        ({"size": 3}, "model.image_processor={'size': 3}"),
    ],
)
def test_what_the_model_can_not_take_is_refused(load: Callable[..., Agent], settings: dict[str, Any], told: str):
    with pytest.raises(ConfigError) as caught:
        load(image_processor=settings)
    assert told in str(caught.value)


def test_pictures_that_are_not_normalised(load: Callable[..., Agent], picture: Callable[..., Image.Image]):
    """Not by our own arithmetic for pictures that need no resizing, either."""
    agent = load(image_processor={"do_normalize": False})
    stock = agent.image_processor(images=[picture(84, 56)], return_tensors="pt")["pixel_values"]
    assert torch.equal(agent.family.pixels([picture(84, 56)])["pixel_values"].flatten(1), stock)


def test_nonsense_beside_dimensions_is_refused_too():
    cfg = ModelConfig(
        "drawn",
        weights="random",
        architecture={"model_type": "qwen2_vl", "text_config": {}, "image_processor": {"sise": 3}},
    )
    with pytest.raises(ConfigError, match=r"model\.architecture\.image_processor\.sise: .* Did you mean 'size'"):
        load_agent(cfg, HardwareConfig("cpu"))
