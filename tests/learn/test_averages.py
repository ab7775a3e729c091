import numpy as np
import pytest

from vlm_agents.learn.averages import Average, over_budget, over_rows, over_tokens, over_turns
from vlm_agents.tensors import Row


def plain(*replies: int) -> Row:
    """A row of replies of these lengths, each after a token of prompt."""
    ends = np.cumsum([1 + length for length in replies]).tolist()
    spans = tuple((end - length, end) for end, length in zip(ends, replies, strict=True))
    return Row("row", np.ones(ends[-1], np.int64), (), spans)


ROWS = [plain(1, 4), plain(3), plain(2)]  # 3 rows, 4 turns, 10 tokens


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (over_turns, [[1 / 4, *[1 / 16] * 4], [1 / 12] * 3, [1 / 8] * 2]),
        (over_rows, [[1 / 15] * 5, [1 / 9] * 3, [1 / 6] * 2]),
        (over_tokens, [[1 / 10] * 5, [1 / 10] * 3, [1 / 10] * 2]),
        (over_budget(8), [[1 / 24] * 5, [1 / 24] * 3, [1 / 24] * 2]),
    ],
    ids=["turns", "rows", "tokens", "budget"],
)
def test_weights_by_hand(average: Average, expected: list[list[float]]):
    found = average(ROWS)
    assert {weights.dtype for weights in found} == {np.dtype(np.float32)}
    for weights, by_hand in zip(found, expected, strict=True):
        np.testing.assert_allclose(weights, by_hand, rtol=1e-6)


@pytest.mark.parametrize("average", [over_turns, over_rows, over_tokens])
def test_a_mean_is_a_mean(average: Average):
    assert np.concatenate(average(ROWS)).sum() == pytest.approx(1.0)
    assert np.concatenate(average(ROWS[1:2])).tolist() == pytest.approx([1 / 3] * 3)
