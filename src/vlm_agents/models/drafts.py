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
        self._likeliest: dict[tuple[int, ...], tuple[int, float]] = {}  # of those, and its share

    def clear(self) -> None:
        self._next.clear()
        self._likeliest.clear()

    def learn(self, reply: Sequence[int]) -> None:
        """A whole reply's tokens."""
        padded = (NONE,) * CONTEXT + tuple(reply)
        for place in range(len(reply)):
            context, token = padded[place : place + CONTEXT], padded[place + CONTEXT]
            seen = self._next[context]
            seen[token] += 1
            best, _ = self._likeliest.get(context, (token, 0.0))
            best = token if seen[token] > seen[best] else best
            self._likeliest[context] = best, seen[best] / seen.total()

    def guess(self, contexts: np.ndarray, room: int) -> np.ndarray:
        """[n w] what each of n replies goes on with, NONE behind the end of its draft; as wide as it is likely to pay.

        `contexts` [n CONTEXT] are the last tokens of each, NONE before its first.
        """
        drafts = np.full((len(contexts), min(room, self.longest)), NONE)
        begun = map(tuple, contexts.tolist())
        chances = [self._extend(draft, context) for draft, context in zip(drafts, begun, strict=True)]
        return drafts[:, : self._width(chances, drafts.shape[1])]

    def _extend(self, draft: np.ndarray, context: tuple[int, ...]) -> list[float]:
        """Writes the likeliest tokens into `draft`; the chance that each of them is reached and right."""
        chances, chance = list[float](), 1.0
        for place in range(len(draft)):
            token, share = self._likeliest.get(context, (NONE, 0.0))
            chance *= share
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
