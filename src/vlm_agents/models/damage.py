"""Damaged folders of models: whatever the libraries raise over them, in one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from vlm_agents.errors import ModelError, VlmAgentsError

PLAIN = OSError, ValueError, ImportError, RuntimeError, SafetensorError  # what they raise with a sentence of its own


@contextmanager
def refusing(what: str, remedy: str, folder: str | Path = "") -> Iterator[None]:
    """Turn whatever the libraries raise over bad files into one line that says what can't be loaded.

    They rarely name the file: the first of `folder` that nobody could read is.
    """
    try:
        yield
    except VlmAgentsError:
        raise
    except Exception as error:
        said = str(error).rstrip(". ")
        kind = "its chat template" if isinstance(error, TemplateError) else type(error).__name__
        reason = said if said and isinstance(error, PLAIN) else f"{kind}: {said}"
        reason = damage(Path(folder)) + shorten(reason, 300, placeholder=" ...")
        raise ModelError(f"{what} can't be loaded: {reason}. {remedy}") from error


def damage(folder: Path) -> str:
    """The first file of a model's folder that is cut or garbled, as the beginning of a sentence; else nothing."""
    for path in sorted(folder.glob("*.*")) if folder != Path() else ():
        try:
            text = path.read_text(encoding="utf-8") if path.suffix in (".json", ".jinja") else ""
            if path.suffix == ".json" and not isinstance(json.loads(text), dict):
                return f"{path.name} holds no JSON object: "
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError):
            return f"{path.name} is damaged: "
    return ""
