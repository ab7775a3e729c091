"""What differs between model families: how pictures become tokens, where tokens stand, which module is which part.

A family speaks to one loaded transformers model. Everything else in this package is family-blind. Pictures are handled
one by one, because a picture's features are cached and reused under its own key.
"""

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm_agents.models.families import llava_next, qwen_vl, unlisted
from vlm_agents.models.families.base import Family, Kind, text_inputs, unknown

__all__ = ["KINDS", "Family", "Kind", "family_of", "kind_of", "text_inputs"]

KINDS = {
    "qwen2_vl": qwen_vl.KIND,
    "qwen2_5_vl": qwen_vl.KIND,
    "qwen3_vl": qwen_vl.KIND,
    "llava_next": llava_next.KIND,
}


def kind_of(model_type: str) -> Kind:
    """ModelError where transformers knows no such model of pictures and text. To be asked before any weight is read."""
    if model_type not in KINDS and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        listed = ", ".join(KINDS)
        raise unknown(model_type, f"it is none of {listed}, and transformers has no AutoModelForImageTextToText for it")
    return KINDS.get(model_type, unlisted.KIND)


def family_of(model: Any, image_processor: Any) -> Family:
    return kind_of(model.config.model_type).family(model, image_processor)
