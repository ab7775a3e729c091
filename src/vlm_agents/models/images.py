"""Features of a batch's pictures, each distinct one encoded once; once for all batches while the vision part is frozen.

In games frames repeat: within a batch, over the turns of an episode, and over PPO's epochs. Features of a frozen vision
part are kept until `clear`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from vlm_agents.models.families import Family
from vlm_agents.pictures import Picture

ENCODE_AT_ONCE = 64  # frames through the vision part in one pass
KEEP_BYTES = 2 << 30  # of features; past it the oldest are encoded anew when needed


class ImageStore:
    """Gives batches the features of their pictures. `frozen` says whether they may be kept."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.frozen = False
        self._seeing: Callable[[], AbstractContextManager[None]] = nullcontext
        self._features: dict[str, Tensor] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget all features: the weights changed, or a run must not depend on what it saw before."""
        self._features.clear()
        self._bytes = 0

    @contextmanager
    def seen_in(self, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Meanwhile what is to be kept is encoded in that context: the policy's, where another adapter answers."""
        before, self._seeing = self._seeing, context
        try:
            yield
        finally:
            self._seeing = before

    def features(self, images: Sequence[Picture]) -> Tensor | None:
        """[sum of tokens, F] features of the pictures, in order; None without pictures.

        They carry a gradient only where the vision part isn't frozen."""
        if not images:
            return None
        keys = [picture.key for picture in images]
        distinct = dict(zip(keys, images, strict=True))
        found = self._kept(distinct) if self.frozen else self._encode(distinct)
        return torch.cat([found[key] for key in keys])

    def _encode(self, distinct: dict[str, Picture]) -> dict[str, Tensor]:
        pixels = self.family.pixels([picture.image for picture in distinct.values()])
        return dict(zip(distinct, self.family.encode(pixels), strict=True))

    @torch.no_grad()
    def _kept(self, distinct: dict[str, Picture]) -> dict[str, Tensor]:
        """Features of each picture by key, encoding those that aren't kept."""
        found = {key: self._features[key] for key in distinct if key in self._features}
        missing = [key for key in distinct if key not in found]
        for start in range(0, len(missing), ENCODE_AT_ONCE):
            chunk = {key: distinct[key] for key in missing[start : start + ENCODE_AT_ONCE]}
            with self._seeing():
                found |= {key: feature.detach().clone() for key, feature in self._encode(chunk).items()}
        for key in missing:
            self._features[key] = found[key]
            self._bytes += found[key].nbytes
        while self._bytes > KEEP_BYTES:
            self._bytes -= self._features.pop(next(iter(self._features))).nbytes
        return found
