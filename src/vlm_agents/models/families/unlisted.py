"""Models without a family of their own."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from operator import attrgetter
from textwrap import shorten
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.utils.hub import cached_file

from vlm_agents.errors import ModelError
from vlm_agents.models.families.base import Kind, LanguageParts, Mm, one_after_another, unknown
from vlm_agents.pictures import as_shown


class Unlisted(LanguageParts):
    """Any other model on LLaVA's plan, such as LLaVA-1.5: one row of pixels and as many features for every picture, one
    rotary axis, causal attention over everything. `probing.verify` tests all of it against transformers when one loads.
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
        out = self.image_processor(images=[as_shown(image) for image in images], return_tensors="pt")
        if (shape := list(out["pixel_values"].shape)) != [len(images), *shape[-3:]]:
            raise self.unlike(f"{len(images)} pictures make pixel_values of shape {shape}, not one row each")
        return {"pixel_values": out["pixel_values"]}

    def encode(self, mm: Mm) -> list[Tensor]:
        pixels = mm["pixel_values"].to(self.model.device, self.model.dtype)  # not every vision part casts
        return list(self.model.model.get_image_features(pixels, return_dict=True).pooler_output)

    positions = one_after_another

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


# Of models made from dimensions alone: CLIP's pictures, and the tiny model's own placeholder and chat template.
KIND = Kind(Unlisted, "CLIPImageProcessorPil", (r"model\.(?!language_model)",), {"image_token_id": "<|image_pad|>"})
