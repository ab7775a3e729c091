"""The LLaVA-NeXT family."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlm_agents.errors import ModelError
from vlm_agents.models.families.base import Kind, LanguageParts, Mm, one_after_another
from vlm_agents.pictures import as_shown


class LlavaNext(LanguageParts):
    """LLaVA-NeXT (1.6): a small view of the whole picture, then its tiles at the resolution that fits it best.

    Tiles are cut back to the picture's own shape, and every row of patches ends in a learned newline.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        if getattr(model.config.text_config, "sliding_window", None):  # Llama's config has no such entry
            raise ModelError(
                "this LLaVA's text model has sliding-window attention, which our cache lacks: use one with "
                "text_config.sliding_window=null, as llava-v1.6-mistral-7b-hf"
            )
        # The processor cuts the tiles, and the model must know into what.
        model.config.image_grid_pinpoints = image_processor.image_grid_pinpoints
        self.model = model
        self.image_processor = image_processor
        self.image_token_id: int = model.config.image_token_id
        classed = model.config.vision_config.model_type == "clip_vision_model"  # has a class token before its patches
        self.processor_config: dict[str, Any] = {  # how many features the model makes of a tile
            "processor_class": "LlavaNextProcessor",
            "patch_size": model.config.vision_config.patch_size,
            "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(classed),
        }
        self._counts: dict[tuple[int, int], int] = {}

    def image_tokens(self, size: tuple[int, int]) -> int:
        """By the model's own packing, of features one wide."""
        if size not in self._counts:
            config, (width, height) = self.model.config, size
            tile = config.vision_config.image_size
            tiles = image_size_to_num_patches([height, width], config.image_grid_pinpoints, tile)
            patches = (tile // config.vision_config.patch_size) ** 2
            _, lengths = self.model.model.pack_image_features(
                [torch.zeros(tiles, patches, 1)],
                [[height, width]],
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                image_newline=torch.zeros(1),
            )
            self._counts[size] = int(lengths[0])
        return self._counts[size]

    def pixels(self, images: Sequence[Image.Image]) -> Mm:
        out = self.image_processor(images=[as_shown(image) for image in images], return_tensors="pt")
        return {"pixel_values": out["pixel_values"], "image_sizes": out["image_sizes"]}

    def encode(self, mm: Mm) -> list[Tensor]:
        pixels = mm["pixel_values"].to(self.model.device)
        return list(self.model.model.get_image_features(pixels, mm["image_sizes"], return_dict=True).pooler_output)

    positions = one_after_another

    def part_of(self, name: str) -> str:
        if ".vision_tower." in f".{name}":
            return "vision"
        return "projector" if ".multi_modal_projector." in f".{name}" or "image_newline" in name else "language"


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{{ text }}\n<</SYS>>\n\n"
    "{% elif message['role'] == 'user' %}[INST] "
    "{{ '<image>\n' * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) }}"
    "{{ text }} [/INST]"
    "{% else %} {{ text }}</s> {% endif %}{% endfor %}"
)
KIND = Kind(
    LlavaNext,
    "LlavaNextImageProcessorPil",
    ("model.vision_tower", "model.multi_modal_projector"),
    {"image_token_index": "<image>"},
    {"bos_token": "<s>", "eos_token": "</s>"},
    CHAT_TEMPLATE,
)
