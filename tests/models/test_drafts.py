import numpy as np
import pytest

from vlm_agents.models.drafts import CONTEXT, NONE, Drafts

FRAME = [1, 2, 3, 4, 5, 6, 7, 8]


def learned(*replies: list[int], longest: int = 8, overhead: float = 4.0) -> Drafts:
    drafts = Drafts(longest, overhead)
    for reply in replies:
        drafts.learn(reply)
    return drafts


def after(*replies: list[int]) -> np.ndarray:
    """The last tokens of each."""
    return np.array([([NONE] * CONTEXT + reply)[-CONTEXT:] for reply in replies])


def test_a_reply_goes_on_as_earlier_ones_did():
    drafts = learned(FRAME)
    assert drafts.guess(after([]), 8).tolist() == [FRAME]
    assert drafts.guess(after([1, 2, 3]), 8).tolist() == [[4, 5, 6, 7, 8]]
    assert drafts.guess(after([9, 1, 2, 3, 4]), 8).tolist() == [[5, 6, 7, 8]]  # the last four tokens decide
    assert drafts.guess(after([1, 2, 9]), 8).shape == (1, 0)
    assert drafts.guess(after(FRAME), 8).shape == (1, 0)


def test_a_draft_is_no_longer_than_asked_or_than_there_is_room():
    assert learned(FRAME, longest=3).guess(after([]), 8).tolist() == [[1, 2, 3]]
    assert learned(FRAME).guess(after([]), 2).tolist() == [[1, 2]]
    assert learned(FRAME).guess(after([]), 0).shape == (1, 0)


def test_a_draft_ends_where_replies_part():
    """After 1 2 two of three went on with 3, then each its own way: 2/3 is sure enough, 1/3 isn't."""
    drafts = learned([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7])
    assert drafts.guess(after([]), 8).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("overhead", "width"), [(0.5, 2), (4.0, 8)])
def test_drafts_are_as_wide_as_pays(overhead: float, width: int):
    """Two rows, of which one's draft has eight tokens and the other's two.

    Tokens gained a row by width w: 1 + w up to 2, then 1 + 2 + (w - 2) / 2. Where a pass costs 0.5 tokens and what it
    reads, 1 + w: 3 / 3.5 = 0.857 at 2, 6 / 9.5 = 0.63 at 8. Where it costs 4: 3 / 7 = 0.43 at 2, 6 / 13 = 0.46 at 8.
    """
    assert learned(FRAME, overhead=overhead).guess(after([], [3, 4, 5, 6]), 8).shape == (2, width)


def test_nothing_is_drafted_by_whom_nothing_is_known():
    drafts = learned(FRAME)
    drafts.clear()
    assert drafts.guess(after([], [1]), 8).shape == (2, 0)


def test_the_likeliest_is_what_came_most_often():
    """Were it the last or the first alone, 9 or 2 would be drafted: 3 came twice of four times."""
    assert learned([1, 2], [1, 3], [1, 3], [1, 9]).guess(after([1]), 1).tolist() == [[3]]
