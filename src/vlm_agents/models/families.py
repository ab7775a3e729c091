"""What differs between model families: how pictures become tokens, where tokens stand, which module is which part.

A family speaks to one loaded transformers model. Everything else in this package is family-blind. Pictures are handled
one by one, because a picture's features are cached and reused under its own key.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from operator import attrgetter
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils.hub import cached_file

from vlm_agents.errors import ModelError

Mm = dict[str, Tensor]


class Family(Protocol):
    """One architecture's own ways."""

    image_token_id: int

    @property
    def processor_config(self) -> dict[str, Any]:
        """What its processor must be told beside tokenizer and image processor; nothing as a rule."""
        ...

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Number of placeholder tokens that a picture of (width, height) takes in the prompt."""
        ...

    def pixels(self, images: Sequence[Image.Image]) -> Mm:
        """What the image processor makes of the pictures, in order."""
        ...

    def encode(self, mm: Mm) -> list[Tensor]:
        """[n_i, F] features of each picture of `pixels`, as `text_inputs` takes them."""
        ...

    def positions(self, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """[P T] position ids of one unpadded row (P rotary axes). The next token follows at their maximum + 1."""
        ...

    # Modules of transformers, whose attributes are not typed.
    @property
    def text(self) -> Any: ...

    @property
    def embed_tokens(self) -> Any: ...

    @property
    def lm_head(self) -> Any: ...

    def part_of(self, name: str) -> str:
        """vision, projector or language: the part that the parameter or module `name` belongs to."""
        ...


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel covers its whole input: the matrix product that it is, at a quarter of the time."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)


class QwenVL:
    """Qwen2-VL, 2.5 and 3: dynamic resolution, merged patches, three rotary axes (time, height, width).

    Qwen3-VL looks at several depths of its vision part: a picture's features are then an embedding and, beside it,
    what is added after the first decoder layers.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model = model
        self.image_processor = image_processor
        self.image_token_id: int = model.config.image_token_id
        self.processor_config: dict[str, Any] = {}
        self.merge: int = image_processor.merge_size
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        model.model.visual.patch_embed.proj.__class__ = PatchEmbedding  # parameters and their names stay as they are

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in patches of a picture of (width, height) pixels, as the processor itself resizes it."""
        if size not in self._grids:
            blank = self.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
            _, height, width = blank["image_grid_thw"][0].tolist()
            self._grids[size] = (height, width)
        return self._grids[size]

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width = self.grid(size)
        return height * width // self.merge**2

    def pixels(self, images: Sequence[Image.Image]) -> Mm:
        sizes = {image.size for image in images}
        patch = self.image_processor.patch_size
        height, width = self.grid(images[0].size)
        if len(sizes) == 1 and images[0].size == (width * patch, height * patch):
            return self._patches(images, height, width)
        out = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}

    def _patches(self, images: Sequence[Image.Image], height: int, width: int) -> Mm:
        """The processor's own arithmetic for pictures that need no resizing, in one pass over the batch.

        The stock processor goes picture by picture, which costs more than the tiny model's forward pass.
        """
        processor, merge, patch = self.image_processor, self.merge, self.image_processor.patch_size
        frames = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        n = len(images)
        frames = frames.view(n, height // merge, merge, patch, width // merge, merge, patch, 3)
        # to [n, block row, block column, row in block, column in block, channel, y, x], the order of the patches, while
        # a channel is still a byte; every patch is then shown `temporal_patch_size` times
        patches = frames.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * height * width, 3, 1, -1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels = (patches * processor.rescale_factor - mean) / std
        pixels = pixels.expand(-1, -1, processor.temporal_patch_size, -1)
        grid = torch.tensor([[1, height, width]] * n)
        return {"pixel_values": pixels.reshape(n * height * width, -1), "image_grid_thw": grid}

    def encode(self, mm: Mm) -> list[Tensor]:
        device = self.embed_tokens.weight.device
        output = self.model.model.get_image_features(
            mm["pixel_values"].to(device), mm["image_grid_thw"].to(device), return_dict=True
        )
        depths = [output.pooler_output]
        for depth in getattr(output, "deepstack_features", []):  # in one piece in transformers 5.17, split since
            depths.append(depth.split([len(part) for part in depths[0]]) if isinstance(depth, Tensor) else depth)
        return [torch.cat(features, dim=-1) for features in zip(*depths, strict=True)]

    def positions(self, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        positions = np.empty((3, len(input_ids)), dtype=np.int64)
        where = np.flatnonzero(input_ids == self.image_token_id)
        cursor, following, taken = 0, 0, 0
        for size in sizes:
            height, width = (side // self.merge for side in self.grid(size))
            first = int(where[taken])
            positions[:, cursor:first] = np.arange(following, following + first - cursor)
            following += first - cursor
            last = first + height * width
            positions[0, first:last] = following
            positions[1, first:last] = following + np.repeat(np.arange(height), width)
            positions[2, first:last] = following + np.tile(np.arange(width), height)
            taken += height * width
            cursor, following = last, following + max(height, width)
        positions[:, cursor:] = np.arange(following, following + len(input_ids) - cursor)
        return positions

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    @property
    def embed_tokens(self) -> Any:
        return self.model.model.language_model.embed_tokens

    @property
    def lm_head(self) -> Any:
        return self.model.lm_head

    def part_of(self, name: str) -> str:
        if ".visual." not in f".{name}":
            return "language"
        return "projector" if ".visual.merger." in f".{name}" or ".deepstack_merger_list." in name else "vision"


class LlavaNext:
    """LLaVA-NeXT (1.6): a small view of the whole picture, then its tiles at the resolution that fits it best.

    Tiles are cut back to the picture's own shape, and every row of patches ends in a learned newline.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        if getattr(model.config.text_config, "sliding_window", None):  # Llama's config has no such entry
            raise ModelError(
                "this LLaVA's text model has sliding-window attention, which our cache lacks: use one with "
                "text_config.sliding_window=null, as llava-v1.6-mistral-7b-hf"
            )
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
        out = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return {"pixel_values": out["pixel_values"], "image_sizes": out["image_sizes"]}

    def encode(self, mm: Mm) -> list[Tensor]:
        pixels = mm["pixel_values"].to(self.embed_tokens.weight.device)
        return list(self.model.model.get_image_features(pixels, mm["image_sizes"], return_dict=True).pooler_output)

    def positions(self, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.arange(len(input_ids))[None]

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    @property
    def embed_tokens(self) -> Any:
        return self.model.model.language_model.embed_tokens

    @property
    def lm_head(self) -> Any:
        return self.model.lm_head

    def part_of(self, name: str) -> str:
        if ".vision_tower." in f".{name}":
            return "vision"
        return "projector" if ".multi_modal_projector." in f".{name}" or "image_newline" in name else "language"


class Unlisted:
    """Any other model on LLaVA's plan, such as LLaVA-1.5: one row of pixels and as many features for every picture, one
    rotary axis, causal attention over everything. `probing.prove` tests all of it against transformers when one loads.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model = model
        self.image_processor = image_processor
        embeddings, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
        for name in ("config.image_token_id", "model.get_image_features", embeddings, head):
            with self.following(f"it has no {name}"):
                attrgetter(name)(model)
        self.image_token_id: int = model.config.image_token_id
        text = self.text.config
        windows = ["sliding_attention"] if getattr(text, "sliding_window", None) else []
        if other := set(getattr(text, "layer_types", None) or windows) - {"full_attention"}:
            raise self.unlike(
                f"its text model has layers of {', '.join(other)}, and our cache knows none but full ones"
            )
        if "token_type_ids" in signature(model.forward).parameters:
            raise self.unlike("its pictures see what comes after them (its forward pass takes token_type_ids)")

    @cached_property
    def processor(self) -> Any | None:
        """transformers' processor of the model's folder, around our image processor; None where the folder has none."""
        source = self.model.name_or_path
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if not source or cached_file(source, "processor_config.json", **quiet) is None:
            return None
        with self.following("its processor can't be loaded"):
            processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
            processor.image_processor = self.image_processor
            return processor

    @property
    def processor_config(self) -> dict[str, Any]:
        settings = json.loads(self.processor.to_json_string()) if self.processor else {}
        return {name: value for name, value in settings.items() if not isinstance(value, dict)}  # those have own files

    @cached_property
    def tokens_each(self) -> int:
        """Features of a picture, as a wide and a tall one show."""
        blanks = [Image.new("RGB", size) for size in ((96, 32), (32, 96))]
        with torch.no_grad(), self.following("a picture can't be encoded from pixel_values alone"):
            counts = [len(features) for features in self.encode(self.pixels(blanks))]
        if len(counts) != 2 or counts[0] != counts[1]:
            raise self.unlike(f"a wide picture and a tall one make {counts} features, not one number for all")
        return counts[0]

    def image_tokens(self, size: tuple[int, int]) -> int:
        return self.tokens_each

    def pixels(self, images: Sequence[Image.Image]) -> Mm:
        out = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        if (shape := list(out["pixel_values"].shape)) != [len(images), *shape[-3:]]:
            raise self.unlike(f"{len(images)} pictures make pixel_values of shape {shape}, not one row each")
        return {"pixel_values": out["pixel_values"]}

    def encode(self, mm: Mm) -> list[Tensor]:
        pixels = mm["pixel_values"].to(self.embed_tokens.weight)  # device and dtype: not every vision part casts
        return list(self.model.model.get_image_features(pixels, return_dict=True).pooler_output)

    def positions(self, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.arange(len(input_ids))[None]

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    @property
    def embed_tokens(self) -> Any:
        return self.model.model.language_model.embed_tokens

    @property
    def lm_head(self) -> Any:
        return self.model.lm_head

    def part_of(self, name: str) -> str:
        """By the names that are usual; what is neither language nor projector by name counts as vision."""
        if ".language_model." in f".{name}." or ".lm_head." in f".{name}.":
            return "language"
        return "projector" if any(word in name for word in ("projector", "connector", "aligner")) else "vision"

    def unlike(self, what: str) -> ModelError:
        return unknown(self.model.config.model_type, what)

    @contextmanager
    def following(self, what: str) -> Iterator[None]:
        """Whatever foreign code raises over calls that it doesn't know becomes a refusal: `what`, and its reason."""
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            reason = shorten(f"{type(error).__name__}: {error}".rstrip(". "), 200, placeholder=" ...")
            raise self.unlike(f"{what} ({reason})") from error


def text_inputs(embeds: Tensor, where: Tensor, features: Tensor) -> dict[str, Any]:
    """What the text model reads: [N T H] `embeds` with `features` [sum of n_i, F] at the placeholders `where` [N T].

    The first H of F stand in for the embeddings; each further H are added there after the first, second ... layer.
    """
    first, *deep = features.to(embeds.device, embeds.dtype).split(embeds.shape[-1], dim=-1)
    inputs: dict[str, Any] = {"inputs_embeds": embeds.masked_scatter(where.unsqueeze(-1), first)}
    return inputs | {"visual_pos_masks": where, "deepstack_visual_embeds": deep} if deep else inputs


# ---- kinds -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """A family's class, and what a model of that family made from its dimensions alone needs."""

    family: Callable[[Any, Any], Family]
    image_processor: str  # class of transformers
    seeing: tuple[str, ...]  # modules of vision and projector, as patterns from the start of a name
    token_ids: Mapping[str, str]  # entry of the config -> token
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # as tokenizers name them
    chat_template: str | None = None  # None: that of the tiny model's tokenizer


QWEN = Kind(
    QwenVL,
    "Qwen2VLImageProcessorPil",
    ("model.visual",),
    {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{{ text }}\n<</SYS>>\n\n"
    "{% elif message['role'] == 'user' %}[INST] "
    "{{ '<image>\n' * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) }}"
    "{{ text }} [/INST]"
    "{% else %} {{ text }}</s> {% endif %}{% endfor %}"
)


KINDS = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "llava_next": Kind(
        LlavaNext,
        "LlavaNextImageProcessorPil",
        ("model.vision_tower", "model.multi_modal_projector"),
        {"image_token_index": "<image>"},
        {"bos_token": "<s>", "eos_token": "</s>"},
        LLAVA_TEMPLATE,
    ),
}


# Of models made from dimensions alone: CLIP's pictures, and the tiny model's own placeholder and chat template.
UNLISTED = Kind(Unlisted, "CLIPImageProcessorPil", (r"model\.(?!language_model)",), {"image_token_id": "<|image_pad|>"})


def kind_of(model_type: str) -> Kind:
    """ModelError where transformers knows no such model of pictures and text. To be asked before any weight is read."""
    if model_type not in KINDS and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise unknown(model_type, "transformers has no AutoModelForImageTextToText for it")
    return KINDS.get(model_type, UNLISTED)


def unknown(model_type: str, what: str) -> ModelError:
    """The refusal of a model that is neither listed nor like those that needn't be."""
    return ModelError(
        f"model_type={model_type} is no family known here ({', '.join(KINDS)}), and can't do without a class in "
        f"models/families.py: {what}. Such a class says how many tokens a picture takes, what their features are and "
        "where they stand"
    )


def family_of(model: Any, image_processor: Any) -> Family:
    return kind_of(model.config.model_type).family(model, image_processor)
