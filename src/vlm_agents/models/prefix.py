"""What the prompts of a batch begin with in common: run once, not once a row. Exact, because attention is causal."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORTH_SHARING = 8, 0.1  # tokens, and of the longest row: a shorter prefix costs more, by bookkeeping and by the mask


def shared_prefix(prompts: Sequence[np.ndarray], image_token_id: int, longest: int) -> int:
    """Number of leading tokens that all prompts have in common before any picture; 0 where sharing doesn't pay, of rows
    up to `longest` tokens.

    Each prompt keeps a token of its own: what follows it is read there.
    """
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts)) - 1
    heads = np.stack([prompt[:shortest] for prompt in prompts])
    same = (heads == heads[0]).all(0) & (heads[0] != image_token_id)
    length, (tokens, share) = int(np.cumprod(same).sum()), WORTH_SHARING
    return length if length >= max(tokens, share * longest) else 0


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1 1 Q K] bool mask of the last `queries` of `keys` positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
