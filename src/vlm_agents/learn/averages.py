"""What a loss is the mean of: a weight for each reply token of a mini-batch, made once for all of it.

Whoever accumulates over ragged micro-batches then only sums, which is exact. Each function returns [k] weights a row.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vlm_agents.tensors import Row

Average = Callable[[Sequence[Row]], list[np.ndarray]]


def over_turns(rows: Sequence[Row]) -> list[np.ndarray]:
    """Turns count alike, and a turn's tokens alike: a loss that is a turn's, repeated for its tokens, counts once."""
    turns = sum(len(row.spans) for row in rows)
    return [_weights([1 / (turns * length) for length in row.reply_lengths], row) for row in rows]


def over_rows(rows: Sequence[Row]) -> list[np.ndarray]:
    """Rows count alike, and a row's reply tokens alike (GRPO, arXiv 2402.03300)."""
    return [_weights([1 / (len(rows) * sum(row.reply_lengths))] * len(row.spans), row) for row in rows]


def over_tokens(rows: Sequence[Row]) -> list[np.ndarray]:
    """All reply tokens count alike (DAPO, arXiv 2503.14476)."""
    tokens = sum(sum(row.reply_lengths) for row in rows)
    return [_weights([1 / tokens] * len(row.spans), row) for row in rows]


def over_budget(tokens: int) -> Average:
    """Each row's sum over a constant, so that no length counts (Dr. GRPO, arXiv 2503.20783): the most tokens that a
    reply may have, whatever the number of turns in a row."""

    def average(rows: Sequence[Row]) -> list[np.ndarray]:
        return [_weights([1 / (len(rows) * tokens)] * len(row.spans), row) for row in rows]

    return average


def _weights(of_turns: Sequence[float], row: Row) -> np.ndarray:
    return np.repeat(np.array(of_turns, dtype=np.float32), row.reply_lengths)
