"""The errors of this package. Each says what is wrong, where, and how to mend it; nothing here prints or exits."""

__all__ = [
    "ConfigError",
    "DataError",
    "EnvError",
    "ModelError",
    "TooLongError",
    "TrainingError",
    "VlmAgentsError",
    "did_you_mean",
    "harmless",
]

import difflib
from collections.abc import Iterable


class VlmAgentsError(Exception):
    """Root of everything that a user can mend. Anything else that escapes is a bug of ours."""


class ConfigError(VlmAgentsError, ValueError):
    """A setting that is unknown, of the wrong type, or at odds with another one."""


class DataError(VlmAgentsError, ValueError):
    """A file or folder that is missing, truncated or not what its writer left."""


class TooLongError(DataError):
    """A prompt that is longer than a model takes, however much of its past is left out."""


class EnvError(VlmAgentsError, RuntimeError):
    """An environment that can't be made, was used out of turn, died or hung."""


class ModelError(VlmAgentsError, RuntimeError):
    """A model folder, processor or adapter that can't serve here."""


class TrainingError(VlmAgentsError, RuntimeError):
    """Training that can't go on: a non-finite loss, or no usable episode."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def harmless(text: str) -> str:
    """The text with control characters spelled out, but for line ends and tabs: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
