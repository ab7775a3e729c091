"""Pictures of a batch as tensors, each distinct one once; encoded once while the vision part is frozen.

In games frames repeat: within a batch, over the turns of an episode, and over PPO's epochs. With a trainable vision
part a batch carries the pixels of its distinct frames. With a frozen one it carries their features, kept until `clear`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_agents.models.families import Family
from vlm_agents.pictures import Picture

ENCODE_AT_ONCE = 64  # frames through the vision part in one pass
KEEP_BYTES = 2 << 30  # of features; past it the oldest are encoded anew when needed


class ImageStore:
    """Gives batches their pictures. `frozen` says whether features may be kept."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.frozen = False
        self._features: dict[str, Tensor] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget all features: the weights changed, or a run must not depend on what it saw before."""
        self._features.clear()
        self._bytes = 0

    def batch(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        """`image_features` [sum of tokens, F] in order when frozen; else `pixel_values` of the distinct pictures, their
        grids or sizes, and `image_index` [len(images)] into them. Empty without pictures."""
        if not images:
            return {}
        keys = [picture.key for picture in images]
        distinct = dict(zip(keys, images, strict=True))
        if self.frozen:
            features = self.features(distinct)
            return {"image_features": torch.cat([features[key] for key in keys])}
        place = {key: index for index, key in enumerate(distinct)}
        return {
            **self.family.pixels([picture.image for picture in distinct.values()]),
            "image_index": torch.tensor([place[key] for key in keys]),
        }

    @torch.no_grad()
    def features(self, distinct: dict[str, Picture]) -> dict[str, Tensor]:
        """Features of each picture by key, encoding those that aren't kept."""
        kept = {key: self._features[key] for key in distinct if key in self._features}
        missing = [key for key in distinct if key not in kept]
        for start in range(0, len(missing), ENCODE_AT_ONCE):
            chunk = missing[start : start + ENCODE_AT_ONCE]
            encoded = self.family.encode(self.family.pixels([distinct[key].image for key in chunk]))
            kept |= {key: feature.detach().clone() for key, feature in zip(chunk, encoded, strict=True)}
        if self.frozen:
            for key in missing:
                self._features[key] = kept[key]
                self._bytes += kept[key].nbytes
            while self._bytes > KEEP_BYTES:
                self._bytes -= self._features.pop(next(iter(self._features))).nbytes
        return kept
