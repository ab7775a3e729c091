"""What every model family answers to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

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

    def caching(self, cache: Any) -> dict[str, Any]:
        """What has `text` read this cache of transformers, and add to it."""
        ...

    @property
    def embed_tokens(self) -> Any: ...

    @property
    def lm_head(self) -> Any: ...

    def part_of(self, name: str) -> str:
        """vision, projector or language: the part that the parameter or module `name` belongs to."""
        ...


@dataclass(frozen=True)
class Kind:
    """A family's class, and what a model of that family made from its dimensions alone needs."""

    family: Callable[[Any, Any], Family]
    image_processor: str  # class of transformers
    seeing: tuple[str, ...]  # modules of vision and projector, as patterns from the start of a name
    token_ids: Mapping[str, str]  # entry of the config -> token
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # as tokenizers name them
    chat_template: str | None = None  # None: that of the tiny model's tokenizer


class LanguageParts:
    """Text model, embeddings and output layer: they are called alike in all families.

    Looked up whenever they are wanted: an adapter puts modules of its own in their places.
    """

    model: Any

    @property
    def text(self) -> Any:
        return self.model.model.language_model

    def caching(self, cache: Any) -> dict[str, Any]:
        return {cache_argument(type(self.text)): cache, "use_cache": True}

    @property
    def embed_tokens(self) -> Any:
        return self.text.embed_tokens

    @property
    def lm_head(self) -> Any:
        return self.model.lm_head


@cache
def cache_argument(text: type) -> str:
    """What the forward of this class of text models calls its cache: transformers 5.24 renamed it, and 5.40 forgets
    the older name. One that it doesn't know it would take, and ignore."""
    return "cache" if "cache" in signature(text.forward).parameters else "past_key_values"


def one_after_another(family: Family, input_ids: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The `positions` of a text model with one rotary axis, to which a picture is a row of tokens like any other."""
    return np.arange(len(input_ids))[None]


def text_inputs(embeds: Tensor, where: Tensor, features: Tensor) -> dict[str, Any]:
    """What the text model reads: [N T H] `embeds` with `features` [sum of n_i, F] at the placeholders `where` [N T].

    The first H of F stand in for the embeddings; each further H are added there after the first, second ... layer.
    """
    first, *deep = features.to(embeds.device, embeds.dtype).split(embeds.shape[-1], dim=-1)
    inputs: dict[str, Any] = {"inputs_embeds": embeds.masked_scatter(where.unsqueeze(-1), first)}
    return inputs | {"visual_pos_masks": where, "deepstack_visual_embeds": deep} if deep else inputs


def unknown(model_type: str, what: str) -> ModelError:
    """The refusal of a model that is neither listed nor like those that needn't be."""
    return ModelError(
        f"model_type={model_type} is no family known here, and can't do without a class in models/families: {what}. "
        "Such a class says how many tokens a picture takes, what their features are and where they stand"
    )
