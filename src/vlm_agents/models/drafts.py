"""What a reply is likely to say next, guessed from what earlier replies said: drafts that the model checks in one pass.

Replies of an agent resemble each other: the same frame of JSON, the same names, thoughts in the same words. A draft is
taken as far as it is what the model samples anyway, so that it changes how long sampling takes, and not what is said.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

CONTEXT = 4  # tokens that a guess looks back on
SURE = 0.5  # share of earlier replies that must have gone on the same way; below it a guess isn't worth its pass
NONE = -1  # no token: before the first of a reply, and where a draft is at its end


class Drafts:
    """Counts, after each few tokens of the replies so far, the token that came next."""

    def __init__(self, longest: int, overhead: float) -> None:
        """At most `longest` tokens a draft. A pass of the model costs as much as `overhead` more tokens a row."""
        self.longest, self.overhead = longest, overhead
        self._next: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def clear(self) -> None:
        self._next.clear()

    def learn(self, reply: Sequence[int]) -> None:
        """A whole reply's tokens."""
        padded = (NONE,) * CONTEXT + tuple(reply)
        for place in range(len(reply)):
            self._next[padded[place : place + CONTEXT]][padded[place + CONTEXT]] += 1

    def guess(self, replies: Sequence[Sequence[int]], room: int) -> np.ndarray:
        """[n w] what each reply goes on with, NONE behind the end of its draft; as wide as it is likely to pay."""
        drafts = np.full((len(replies), min(room, self.longest)), NONE)
        chances = [self._extend(draft, reply) for draft, reply in zip(drafts, replies, strict=True)]
        return drafts[:, : self._width(chances, drafts.shape[1])]

    def _extend(self, draft: np.ndarray, reply: Sequence[int]) -> list[float]:
        """Writes the likeliest tokens into `draft`; the chance that each of them is reached and right."""
        context = ((NONE,) * CONTEXT + tuple(reply[-CONTEXT:]))[-CONTEXT:]
        chances, chance = list[float](), 1.0
        for place in range(len(draft)):
            if (seen := self._next.get(context)) is None:
                break
            (token, count), *_ = seen.most_common(1)
            chance *= count / seen.total()
            if chance < SURE:
                break
            draft[place] = token
            chances.append(chance)
            context = (*context[1:], token)
        return chances

    def _width(self, chances: Sequence[Sequence[float]], most: int) -> int:
        """The width at which a pass gives the most tokens for what it costs."""
        each = np.zeros((len(chances), most))
        for row, known in zip(each, chances, strict=True):
            row[: len(known)] = known
        gained = np.concatenate([[1.0], 1.0 + each.mean(0).cumsum()])
        return int(np.argmax(gained / (self.overhead + 1 + np.arange(most + 1))))
