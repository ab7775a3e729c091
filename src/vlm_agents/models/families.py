"""What differs between model families: how pictures become tokens, where tokens stand, which module is which part.

A family speaks to one loaded transformers model. Everything else in this package is family-blind. Pictures are handled
one by one, because a picture's features are cached and reused under its own key.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_agents.errors import ModelError

Mm = dict[str, Tensor]


class Family(Protocol):
    """One architecture's own ways."""

    image_token_id: int

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Number of placeholder tokens that a picture of (width, height) takes in the prompt."""
        ...

    def pixels(self, images: Sequence[Image.Image]) -> Mm:
        """What the image processor makes of the pictures, in order."""
        ...

    def encode(self, mm: Mm) -> list[Tensor]:
        """[n_i, H] features of each picture of `pixels`."""
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
    """Qwen2-VL and Qwen2.5-VL: dynamic resolution, merged patches, three rotary axes (time, height, width)."""

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model = model
        self.image_processor = image_processor
        self.image_token_id: int = model.config.image_token_id
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
        return list(output.pooler_output)

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
        return "projector" if ".visual.merger." in f".{name}" else "vision"


def family_of(model: Any, image_processor: Any) -> Family:
    """The family of a loaded model; ModelError where there is none yet."""
    kind = model.config.model_type
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return QwenVL(model, image_processor)
    raise ModelError(f"no model family for model_type={kind}: known are qwen2_vl, qwen2_5_vl (models/families.py)")
