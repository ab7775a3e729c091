"""Image processors: a model's own, or one from dimensions alone, with what a run wants otherwise.

Pictures are resized by Pillow even where torchvision is there: the two differ by up to 0.2 in a pixel, and runs must
not depend on it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers 5.17 hides it at the top

from vlm_agents.errors import ConfigError, did_you_mean
from vlm_agents.models.families import Family, Kind

PROCESSOR_FILE = "preprocessor_config.json"
SIZES = (64, 64), (1024, 768)


def load_image_processor(source: str) -> Any:
    """That of the folder or hub id."""
    return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)


def make_image_processor(kind: Kind, settings: Mapping[str, Any]) -> Any:
    """One of the family's class, with the `image_processor` of `model.architecture`."""
    return adjusted(getattr(transformers, kind.image_processor)(), settings, "model.architecture.image_processor")


def adjusted(processor: Any, settings: Mapping[str, Any], where: str = "model.image_processor") -> Any:
    """The same with these settings; ConfigError for one that its class doesn't know."""
    if not settings:
        return processor
    own = processor.to_dict()
    accepted = {*getattr(getattr(processor, "valid_kwargs", None), "__annotations__", ())}
    known = {*own, *({"min_pixels", "max_pixels"} & accepted)} - {"image_processor_type"}  # more is taken, and unused
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: {type(processor).__name__} knows no such setting.{did_you_mean(name, known)} "
                f"It knows: {', '.join(sorted(known))}"
            )
    try:
        changed = type(processor)(**{name: value for name, value in own.items() if name in known} | dict(settings))
        size = dict(getattr(changed, "size", None) or {})
        low, high = size.get("shortest_edge", 0), size.get("longest_edge", math.inf)
        inverted = high < low
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where}={dict(settings)}: {type(processor).__name__} can't take it ({error})") from error
    if inverted:
        raise ConfigError(
            f"{where} bounds pictures between {low} and {high} pixels: set min_pixels and max_pixels, the first one no "
            "higher than the second"
        )
    return changed


@torch.no_grad()
def prove_settings(family: Family, settings: Mapping[str, Any]) -> None:
    """ConfigError where the model can't take pictures that are processed so. Nothing to do on the meta device."""
    if not settings or family.embed_tokens.weight.device.type == "meta":
        return
    for size in SIZES:
        try:
            pixels = family.pixels([Image.new("RGB", size)])
            if not pixels["pixel_values"].isfinite().all():
                raise ValueError("its pixels are no finite numbers")
            features, expected = len(family.encode(pixels)[0]), family.image_tokens(size)
        except (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError) as error:
            raise ConfigError(f"model.image_processor={dict(settings)} doesn't go with this model ({error})") from error
        if features != expected:
            raise ConfigError(
                f"model.image_processor={dict(settings)} doesn't go with this model: it makes {features} features of a "
                f"picture of {size[0]}x{size[1]} pixels that has {expected} tokens"
            )
