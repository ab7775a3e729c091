"""The Qwen-VL family."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_agents.models.families.base import Kind, LanguageParts, Mm
from vlm_agents.pictures import as_shown


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel covers its whole input, [P 3 T y x]: the matrix product that it is, at a quarter of
    the time. Where all T frames of a patch are one and the same in memory, the sum of their weights does."""

    def forward(self, input: Tensor) -> Tensor:
        still = input.stride(2) == 0
        patches, weight = (input[:, :, 0], self.weight.sum(2)) if still else (input, self.weight)
        return nn.functional.linear(patches.flatten(1), weight.flatten(1), self.bias)


class QwenVL(LanguageParts):
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
        plain = self.image_processor.do_rescale and self.image_processor.do_normalize
        if plain and len(sizes) == 1 and images[0].size == (width * patch, height * patch):
            return self._patches(images, height, width)
        out = self.image_processor(images=[as_shown(image) for image in images], return_tensors="pt")
        frames = out["pixel_values"].view(-1, 3, self.image_processor.temporal_patch_size, patch, patch)
        return {"pixel_values": self._still(frames[:, :, :1]), "image_grid_thw": out["image_grid_thw"]}

    def _still(self, patches: Tensor) -> Tensor:
        """[P 3 1 y x] patches as often as the model wants to see them, and held once."""
        return patches.expand(-1, -1, self.image_processor.temporal_patch_size, -1, -1)

    def _patches(self, images: Sequence[Image.Image], height: int, width: int) -> Mm:
        """The processor's own arithmetic for pictures that need no resizing, in one pass over the batch.

        The stock processor goes picture by picture, which costs more than the tiny model's forward pass.
        """
        processor, merge, patch = self.image_processor, self.merge, self.image_processor.patch_size
        frames = torch.from_numpy(np.stack([np.asarray(as_shown(image)) for image in images]))
        n = len(images)
        frames = frames.view(n, height // merge, merge, patch, width // merge, merge, patch, 3)
        # to [n, block row, block column, row in block, column in block, channel, y, x], the order of the patches, while
        # a channel is still a byte
        patches = frames.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * height * width, 3, 1, patch, patch)
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels = patches.float().mul_(processor.rescale_factor).sub_(mean).div_(std)
        return {"pixel_values": self._still(pixels), "image_grid_thw": torch.tensor([[1, height, width]] * n)}

    def encode(self, mm: Mm) -> list[Tensor]:
        device = self.model.device
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

    def part_of(self, name: str) -> str:
        if ".visual." not in f".{name}":
            return "language"
        return "projector" if ".visual.merger." in f".{name}" or ".deepstack_merger_list." in name else "vision"


KIND = Kind(
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
