"""A saved folder, made readable for transformers 4.57 as well, and for servers that stand on it.

Version 5 gave these settings other names, or another place, and reads both.
"""

import json
from pathlib import Path
from typing import Any


def add_older_names(folder: Path) -> None:
    """Give the settings that a folder of `save_pretrained` holds the names of version 4, too."""
    _edit(folder / "config.json", _dimensions)
    _edit(folder / "tokenizer_config.json", _tokens)


def _edit(path: Path, change: Any) -> None:
    if path.is_file():  # an adapter has no config.json
        settings = json.loads(path.read_text(encoding="utf-8"))
        change(settings)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dimensions(config: dict[str, Any]) -> None:
    text = config.get("text_config", config)
    rotations = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rotations:
        text |= {"rope_theta": rotations.pop("rope_theta"), "rope_scaling": rotations}
    if "vocab_size" in text:
        config.setdefault("vocab_size", text["vocab_size"])


def _tokens(settings: dict[str, Any]) -> None:
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
