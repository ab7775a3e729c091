import numpy as np
import pytest

from vlm_agents.learn.batches import Shares, microbatches, minibatches
from vlm_agents.tensors import Row
from vlm_agents.world import World


def plain(length: int) -> Row:
    """A reply of one token at the end of `length` tokens."""
    return Row(f"row {length}", np.ones(length, np.int64), (), ((length - 1, length),))


@pytest.mark.parametrize(
    ("turns", "sizes"), [(128, [10]), (10, [10]), (6, [5, 5]), (4, [5, 5]), (3, [3, 4, 3]), (1, [1] * 10)]
)
def test_minibatches_are_even_and_hold_every_row_once(turns: int, sizes: list[int]):
    found = minibatches([1] * 10, turns, np.random.default_rng(0))
    assert [len(part) for part in found] == sizes
    assert sorted(index for part in found for index in part) == list(range(10))
    assert [index for part in found for index in part] != list(range(10))
    again = minibatches([1] * 10, turns, np.random.default_rng(0))
    assert found == again


def test_minibatches_count_turns_not_rows():
    lengths = [6] * 3 + [1] * 18
    for seed in range(10):
        parts = minibatches(lengths, 18, np.random.default_rng(seed))
        sizes = [sum(lengths[index] for index in part) for part in parts]
        assert sum(sizes) == 36
        assert [abs(size - 18) <= 3 for size in sizes] == [True, True]  # off by at most half the longest row


def test_microbatches_cut_by_padded_tokens_longest_first():
    found = microbatches([plain(length) for length in (4, 9, 5, 30, 10, 4)], max_tokens=20)
    # 30 is over the budget and alone; 2 * 10; 4 * 5
    assert [[len(sample) for sample in part] for part in found] == [[30], [10, 9], [5, 4, 4]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_rows_by_their_tokens(ranks: int):
    rows = [plain(length) for length in (4, 9, 5, 30, 10, 4)]
    deals = [Shares(20, World(rank, ranks)).deal(rows) for rank in range(ranks)]
    dealt = [deal.own for deal in deals]
    assert sorted(id(row) for cuts in dealt for cut in cuts for row in cut) == sorted(map(id, rows))  # each row once
    loads = [sum(len(row) for cut in cuts for row in cut) for cuts in dealt]
    # 62 tokens: one row of 30 is nearly half of them, and no rank has more than it and less than the smallest row
    assert loads == {1: [62], 2: [30, 32], 3: [30, 18, 14], 8: [30, 10, 9, 5, 4, 4, 0, 0]}[ranks]
    assert [deal.missing + len(deal.own) for deal in deals] == [max(map(len, dealt))] * ranks
    assert all(len(cut) == 1 or len(cut[0]) * len(cut) <= 20 for cuts in dealt for cut in cuts)
