"""A chat model's answers on disk: those of one run, and a cache for all runs. Knows nothing of HTTP, games or keys.

An answer is a small JSON file, named by the hash of its question: model, messages with every pixel, limits,
temperature and seed, so that one sample never passes for another. In the cache the server's address belongs to the
question too, since a model's name means nothing elsewhere. A run finds its own answers wherever the server has moved,
and remembers which of them it asked for itself: what is counted is the cost of the whole run, not of one process.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from vlm_agents.files import atomic_write, writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `readable` is what the caller's check said of it; tokens are 0 where the server counts none.

    `cached` says that another run had asked for it; `refused`, with an empty text, what the server said instead.
    """

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    readable: bool = True
    cached: bool = False
    refused: str = ""


class Answers:
    """The answers in the run's `folder`, and in the `cache` under the server's `address`."""

    def __init__(self, folder: Path, cache: Path, address: str) -> None:
        self._folder = folder
        self._cache = cache
        self._address = address.encode()

    def of_run(self, question: bytes) -> Completion | None:
        return load(self._in_run(question))

    def of_cache(self, question: bytes) -> Completion | None:
        answer = load(self._in_cache(question))
        return answer and replace(answer, cached=True)

    def keep(self, question: bytes, answer: Completion) -> None:
        for place in (
            self._folder,
            self._cache,
        ):  # not before there is an answer: a server that isn't there leaves none
            with writing(place):
                place.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(answer))
        atomic_write(self._in_run(question), content)  # first: a run killed in between counts what it paid for
        if not answer.cached and not answer.refused:  # another run may ask again
            atomic_write(self._in_cache(question), content)

    def counts(self) -> dict[str, float]:
        """How many answers the run has asked for and how many it found in the cache, their tokens, and how many of
        both were not readable."""
        answers = self.all_of_run()
        counts = {"unparsable": float(sum(not answer.readable for answer in answers))}
        for cached, prefix in ((False, ""), (True, "cached_")):
            some = [answer for answer in answers if answer.cached == cached]
            counts[f"{prefix}answers"] = float(len(some))
            counts[f"{prefix}prompt_tokens"] = float(sum(answer.prompt_tokens for answer in some))
            counts[f"{prefix}completion_tokens"] = float(sum(answer.completion_tokens for answer in some))
        return counts

    def all_of_run(self) -> list[Completion]:
        return [answer for path in sorted(self._folder.glob("*.json")) if (answer := load(path))]

    def _in_run(self, question: bytes) -> Path:
        return self._folder / f"{digest(question)}.json"

    def _in_cache(self, question: bytes) -> Path:
        return self._cache / f"{digest(self._address + b' ' + question)}.json"


def digest(question: bytes) -> str:
    return hashlib.sha256(question).hexdigest()[:32]


def load(path: Path) -> Completion | None:
    """The answer in that file; None if there is none, or nothing sound."""
    try:
        answer = Completion(**json.loads(path.read_bytes()))
        for one in fields(answer):
            value = getattr(answer, one.name)
            if type(value) is not (str if one.name == "finish" else one.type):
                raise TypeError(f"{one.name} is of type {type(value).__name__}")
        return answer
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("%s: ignored, for it can't be read as an answer (%s)", path, error)
        return None
