"""Models without a family of their own: those on LLaVA's plan load and are proven, all others are refused in a line.

That such a model scores, samples and trains as transformers has it is in test_twins; here is how it comes and goes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlm_agents.config import HardwareConfig, LoraConfig, ModelConfig
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.memory import blueprint
from vlm_agents.models.probing import SIZES, TEXT, verify
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row
from vlm_agents.types import Message, Prompt

Noise = Callable[..., Image.Image]
MakeRow = Callable[..., Row]
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 700,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def load(folder: Path, dtype: str = "float32", **settings: Any) -> Agent:
    return load_agent(ModelConfig("other", path=str(folder), **settings), HardwareConfig("cpu", dtype=dtype))


@pytest.fixture
def copied(llava_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLaVA-1.5 to change."""
    return Path(shutil.copytree(llava_folder, tmp_path / "copied"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def logprobs(agent: Agent, row: Row) -> torch.Tensor:
    with torch.no_grad():
        return agent.score([row]).logprobs


# ---- what loads ------------------------------------------------------------------------------------------------------
def test_prompts_and_pictures_are_those_of_its_processor(llava_folder: Path, chats: list[Prompt], picture: Noise):
    agent, processor = load(llava_folder), AutoProcessor.from_pretrained(llava_folder)
    wide_and_tall = (picture(300, 40), picture(17, 200))
    for images in [wide_and_tall, *([one.image for one in chat[1].images] for chat in chats)]:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "go"}]
        chat = [
            {"role": "system", "content": [{"type": "text", "text": "You play."}]},
            {"role": "user", "content": parts},
        ]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = agent.renderer.render(
            (Message("system", ("You play.",)), Message("user", (*map(Picture, images), "go")))
        )
        assert ours.ids.tolist() == inputs["input_ids"][0].tolist()
        assert ours.ids.tolist().count(agent.family.image_token_id) == 9 * len(images)  # 84 / 28 patches each way
        if images:
            assert torch.equal(agent.family.pixels(images)["pixel_values"], inputs["pixel_values"])


def test_a_saved_one_is_the_same_and_serves_as_before(
    llava_folder: Path, chats: list[Prompt], make_row: MakeRow, tmp_path: Path
):
    agent = load(llava_folder)
    row = make_row(agent, chats[2], [30, 31])
    agent.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logprobs(again, row), logprobs(agent, row))
    # what servers are told: all but the parts, which have files of their own
    stock, saved = (json.loads((f / "processor_config.json").read_text()) for f in (llava_folder, tmp_path))
    assert saved == {name: value for name, value in stock.items() if name != "image_processor"}
    ours, theirs = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path, llava_folder))
    images = [one.image for one in chats[2][1].images]
    text = theirs.tokenizer.decode(agent.renderer.render(chats[2]).ids).replace("<image>" * 9, "<image>")
    one, other = (p(text=text, images=images, return_tensors="pt") for p in (ours, theirs))
    assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "pixel_values"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_has_room_for_rounding_and_no_more(llava_folder: Path, dtype: str):
    """A forward pass that scales its logits, as some models do, is another model. By 3 in 1000: within bfloat16's
    root of epsilon 2 ** -7, 0.09, and beyond float32's of 2 ** -23, 0.0003."""
    agent = load(llava_folder, dtype)
    scale = 1.003

    def scaled(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits * scale
        return output

    agent.model.register_forward_hook(scaled)
    if dtype == "bfloat16":
        verify(agent)
        scale = 1.2
    with pytest.raises(ModelError, match=r"model_type=llava .*own forward pass gives other logits than ours"):
        verify(agent)


def test_a_tokenizer_needs_no_padding_token(copied: Path, chats: list[Prompt], make_row: MakeRow):
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(copied).pad_token_id is None
    agent = load(copied)
    rows = [make_row(agent, chat, [30, 31]) for chat in chats[:3]]
    with torch.no_grad():
        together = agent.score(rows).logprobs
    torch.testing.assert_close(together, torch.cat([logprobs(agent, row) for row in rows]), rtol=0, atol=2e-5)


def test_four_bits_are_those_of_the_language_part(llava_folder: Path):
    agent = load(llava_folder, quantize="nf4", lora=LoraConfig(rank=4))
    for name, module in agent.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not name.endswith("lm_head"):
            assert isinstance(module, Linear4bit) is (agent.family.part_of(name) == "language"), name


def test_dimensions_alone_make_one_too(llava_folder: Path, tmp_path: Path):
    """Without a processor there is nothing to compare prompts with; logits are compared all the same."""
    architecture = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **LANGUAGE, "vocab_size": 2000},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    }
    pictures = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    cfg = ModelConfig("drawn", weights="random", architecture=architecture, image_processor=pictures)
    agent = load_agent(cfg, HardwareConfig("cpu"))
    assert agent.family.image_tokens((84, 56)) == 4  # 28 / 14 patches each way
    agent.save(tmp_path)
    assert load(tmp_path).family.image_tokens((84, 56)) == 4


def test_a_blueprint_counts_its_pictures(llava_folder: Path):
    agent = blueprint(ModelConfig("other", path=str(llava_folder)), HardwareConfig("cpu"))
    assert agent.device.type == "meta"
    assert agent.family.image_tokens((640, 480)) == 9


# ---- what is refused -------------------------------------------------------------------------------------------------
def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "a class in models/families:" in message
    return message


def made(
    folder: Path, llava_folder: Path, image_processor: str, vision_type: str, text_type: str, **entries: Any
) -> str:
    """The refusal of a tiny model of these classes, with the tokenizer and chat template of the tiny LLaVA."""
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    settings: dict[str, Any] = {
        "text_config": {"model_type": text_type, **LANGUAGE},
        "vision_config": {"model_type": vision_type, **VISION},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    config = AutoConfig.for_model(**settings | entries)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    getattr(transformers, image_processor)().save_pretrained(folder)
    return refusal(folder)


def test_sliding_windows_are_refused(llava_folder: Path, tmp_path: Path):
    entries = {"model_type": "gemma3", "mm_tokens_per_image": 4, "boi_token_index": 5, "eoi_token_index": 6}
    said = made(tmp_path, llava_folder, "Gemma3ImageProcessorPil", "siglip_vision_model", "gemma3_text", **entries)
    assert "model_type=gemma3 is no family known here" in said
    assert "layers of sliding_attention" in said


def test_pictures_that_see_what_comes_after_them_are_refused(llava_folder: Path, tmp_path: Path):
    entries = {"model_type": "paligemma", "projection_dim": 32}
    said = made(tmp_path, llava_folder, "SiglipImageProcessorPil", "siglip_vision_model", "gemma", **entries)
    assert "model_type=paligemma is no family known here" in said
    assert "pictures see what comes after them" in said


def test_several_rows_a_picture_are_refused(llava_folder: Path, tmp_path: Path):
    entries = {"model_type": "llava_onevision", "vision_feature_layer": -1}
    said = made(tmp_path, llava_folder, "LlavaOnevisionImageProcessorPil", "siglip_vision_model", "qwen2", **entries)
    assert "2 pictures make pixel_values of shape [2, 2, 3, 384, 384], not one row each" in said


def test_a_number_of_features_that_changes_is_refused(llava_folder: Path, tmp_path: Path):
    entries = {"model_type": "llava", "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    said = made(tmp_path, llava_folder, "PixtralImageProcessorPil", "pixtral", "llama", **entries)
    assert "model_type=llava is no family" in said
    assert "a wide picture and a tall one make [72] features" in said


def test_a_missing_part_is_refused(llava_folder: Path, tmp_path: Path):
    said = made(tmp_path, llava_folder, "Idefics3ImageProcessorPil", "idefics3_vision", "llama", model_type="idefics3")
    assert "model_type=idefics3 is no family" in said
    assert "it has no model.language_model" in said


def test_a_processor_that_writes_other_prompts_is_refused(copied: Path):
    """With one additional feature less it writes 8 placeholders where the model makes 9 features."""
    count = len(load(copied).renderer.render((Message("user", (Picture(Image.new("RGB", SIZES[0])), TEXT)),)).ids)
    change(copied / "processor_config.json", num_additional_image_tokens=0)
    said = refusal(copied)
    assert "is its processor_config.json whole?" in said
    assert f"makes {count - 1} tokens of a prompt where we make {count}" in said


def test_a_processor_that_cuts_wide_pictures_into_tiles_is_refused(llava_folder: Path, tmp_path: Path):
    """Which no square picture would show, nor the image processor: it is told to by the processor around it."""
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    config = AutoConfig.for_model(
        "aya_vision",
        text_config={"model_type": "llama", **LANGUAGE, "vocab_size": len(tokenizer) + 16},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    image_processor = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    chat_template = tokenizer.chat_template
    processor = transformers.AyaVisionProcessor(
        image_processor, tokenizer, 14, 28, image_token="<image>", chat_template=chat_template
    )
    processor.save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert "model_type=aya_vision is no family" in said
    assert "tokens of a prompt where we make" in said


@pytest.mark.skipif(not hasattr(transformers, "DeepseekOcr2Processor"), reason="transformers knows no DeepSeek-OCR-2")
def test_a_processor_that_cuts_large_pictures_into_tiles_is_refused(llava_folder: Path, tmp_path: Path):
    """Those above 768 pixels: they come beside `pixel_values`, which has a row a picture whatever its size."""
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    mixture = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    layers = {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam = {"output_channels": 16, "downsample_channels": [16, 32], "global_attn_indexes": []}
    config = AutoConfig.for_model(
        "deepseek_ocr2",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        text_config={**LANGUAGE, **mixture, **layers},
        vision_config={
            "sam_config": {**small, "hidden_size": 16, **sam},
            "encoder_config": {**small, "vocab_size": 32, "num_key_value_heads": 2},
        },
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    image_processor = transformers.DeepseekOcr2ImageProcessorPil()
    processor = transformers.DeepseekOcr2Processor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    processor.save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert "model_type=deepseek_ocr2 is no family" in said
    assert "tokens of a prompt where we make" in said


def test_a_processor_that_cant_work_is_refused(copied: Path):
    """As transformers' own loader would let it pass: how large patches are is in no other file that it reads."""
    change(copied / "processor_config.json", patch_size=None)
    assert "its processor can't take one picture and a text" in refusal(copied)


def test_a_tokenizer_without_the_placeholder_is_refused(copied: Path, tiny_folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, copied / name)
    with pytest.raises(ModelError, match=r"the model's tokenizer has no token \d+, the picture's"):
        load(copied)


def test_a_template_without_pictures_is_refused(copied: Path):
    (copied / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    assert "a prompt with 1 pictures has 0 placeholders <image>" in refusal(copied)
