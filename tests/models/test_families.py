from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import logging as transformers_logging

from vlm_agents.models import Agent
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row
from vlm_agents.types import Prompt

Noise = Callable[..., Image.Image]


def test_the_cache_has_the_name_that_transformers_gives_it_now(agent: Agent):
    """And an older one, or any other deprecation, fails the tests: transformers warns of some, and logs others."""
    cache, embeds = DynamicCache(), torch.zeros(1, 3, 128)
    agent.family.text(inputs_embeds=embeds, **agent.family.caching(cache))
    assert cache.get_seq_length() == 3
    if "cache" in agent.family.caching(cache):
        with pytest.raises(FutureWarning, match="past_key_values"):
            agent.family.text(inputs_embeds=embeds, past_key_values=DynamicCache())
    with pytest.raises(FutureWarning, match="older"):
        transformers_logging.get_logger("transformers.models").warning_once("`older` is deprecated")


@pytest.mark.parametrize(
    "sizes",
    [
        [(84, 56)] * 3,  # exact: multiples of 28, all equal
        [(100, 75)] * 2,  # the processor makes 112 x 84 of them
        [(84, 56), (56, 84)],  # exact but mixed
        [(84, 56), (100, 75), (20, 30)],  # the last is smaller than the processor's least
    ],
    ids=["exact", "resized", "mixed", "mixed, resized"],
)
def test_pixels_are_those_of_the_stock_processor(agent: Agent, picture: Noise, sizes: list[tuple[int, int]]):
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    stock = agent.image_processor(images=images, return_tensors="pt")
    own = agent.family.pixels(images)
    assert torch.equal(own["image_grid_thw"], stock["image_grid_thw"])
    torch.testing.assert_close(own["pixel_values"].flatten(1), stock["pixel_values"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(agent.family.encode(own)), torch.cat(agent.family.encode(stock)))
    # a merged token stands for 2 x 2 patches
    tokens = [agent.family.image_tokens(size) for size in sizes]
    assert tokens == (stock["image_grid_thw"].prod(-1) // 4).tolist()


def test_pictures_without_three_channels_are_made_rgb(agent: Agent, picture: Noise):
    grey = picture(84, 56).convert("L")
    one, other = (agent.family.pixels([image])["pixel_values"] for image in (grey, grey.convert("RGB")))
    assert torch.equal(one, other)


def test_pictures_are_told_apart_by_what_they_show(agent: Agent, picture: Noise):
    """A palette and transparency count: equal bytes need not look alike."""
    warm, cold = picture(84, 56).convert("P"), picture(84, 56).convert("P")
    cold.putpalette([255 - level for level in warm.getpalette() or []])
    clear = picture(84, 56).convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", clear.size, "white")
    keys = [Picture(image).key for image in (warm, cold, clear, white)]
    assert [keys.index(key) for key in keys] == [0, 1, 2, 2]
    with torch.no_grad():
        features = agent.images.features([Picture(image) for image in (warm, cold, clear, white)])
    assert features is not None
    first, second, third, fourth = features.split(6)
    assert not torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert torch.equal(agent.family.pixels([clear])["pixel_values"], agent.family.pixels([white])["pixel_values"])


def test_each_picture_is_encoded_as_if_alone(agent: Agent, picture: Noise):
    images = [picture(84, 56, 1), picture(100, 75, 2), picture(56, 56, 3)]
    with torch.no_grad():
        together = agent.family.encode(agent.family.pixels(images))
        alone = [agent.family.encode(agent.family.pixels([image]))[0] for image in images]
    assert [len(features) for features in together] == [6, 12, 4]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_pictures_are_encoded_as_transformers_does(agent: Agent, tiny_folder: Path, picture: Noise):
    stock: Any = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    inputs = agent.image_processor(images=[picture(84, 56, 1), picture(100, 75, 2)], return_tensors="pt")
    with torch.no_grad():
        expected = stock.model.get_image_features(**inputs, return_dict=True).pooler_output
        found = agent.family.encode(dict(inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_positions_are_those_of_the_model(agent: Agent, chats: list[Prompt], make_row: Callable[..., Row]):
    rows = [make_row(agent, chat, [10, 11, 12][:length]) for chat, length in zip(chats, (1, 3, 2, 1, 3), strict=True)]
    tokens = agent.collate(rows)
    where = torch.arange(tokens.input_ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    images = [one.image for row in rows for one in row.images]
    grids = agent.image_processor(images=images, return_tensors="pt")["image_grid_thw"]
    expected, deltas = agent.model.model.get_rope_index(
        tokens.input_ids,
        mm_token_type_ids=(tokens.input_ids == agent.family.image_token_id).int(),
        image_grid_thw=grids,
        attention_mask=where.long(),
    )
    assert len({int(count) for count in where.sum(1)}) == 5  # mixed lengths
    assert torch.equal(tokens.positions[:, where], expected[:, where])
    # the token after a row follows at the maximum + 1, which transformers keeps as that less the length
    following = [int(tokens.positions[:, index, mask].max()) + 1 for index, mask in enumerate(where)]
    assert [after - int(mask.sum()) for after, mask in zip(following, where, strict=True)] == deltas[:, 0].tolist()


def test_positions_of_plain_text_count_on_every_axis(agent: Agent):
    assert agent.family.positions(np.array([10, 11, 12]), []).tolist() == [[0, 1, 2]] * 3


def test_every_parameter_is_of_one_part(agent: Agent):
    parts: dict[str, set[str]] = {"vision": set(), "projector": set(), "language": set()}
    for name, _ in agent.model.named_parameters():
        parts[agent.family.part_of(name)].add(name)
        assert agent.family.part_of(f"base_model.model.{name}") == agent.family.part_of(name)  # peft's names
    assert all(name.startswith(("model.visual.patch_embed.", "model.visual.blocks.")) for name in parts["vision"])
    assert all(name.startswith("model.visual.merger.") for name in parts["projector"])
    assert all(name.startswith("model.language_model.") for name in parts["language"])
    # 2 layers of 12 and the patch embedding; norm and 2 linear layers; 4 layers of 12, embeddings and norm
    assert {part: len(names) for part, names in parts.items()} == {"vision": 25, "projector": 5, "language": 50}
