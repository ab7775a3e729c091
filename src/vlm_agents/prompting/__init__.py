"""What a policy is told and how its reply is read. Knows no env, no model and no tensor.

A new format is a module with a class that has the three methods of `PromptFormat`, a line in `FORMATS`, its name in
`PromptConfig` and a YAML in conf/prompt/. Outside the package it is the class alone, and `prompt.factory` names it.
"""

__all__ = [
    "Fitted",
    "PromptFormat",
    "chat",
    "check_format",
    "cut_off",
    "drawn",
    "find_object",
    "make_format",
    "match_action",
]

from collections.abc import Callable

from vlm_agents.config import PromptConfig
from vlm_agents.imports import made
from vlm_agents.prompting.action_only import ActionOnly
from vlm_agents.prompting.action_scores import ActionScores
from vlm_agents.prompting.base import (
    Fitted,
    PromptFormat,
    chat,
    check_format,
    cut_off,
    drawn,
    find_object,
    match_action,
)
from vlm_agents.prompting.cot_json import CotJson
from vlm_agents.prompting.rl4vlm import RL4VLM

FORMATS: dict[str, Callable[[PromptConfig], PromptFormat]] = {
    "cot_json": CotJson,
    "action_only": ActionOnly,
    "action_scores": ActionScores,
    "rl4vlm": RL4VLM,
}


def custom(cfg: PromptConfig) -> PromptFormat:
    """The user's own format; ConfigError where that isn't one."""
    found = made("prompt.factory", str(cfg.factory), cfg, needs=("prompt", "parse", "write"))
    check_format(found, f"prompt.factory={cfg.factory}")
    return found


FORMATS["custom"] = custom


def make_format(cfg: PromptConfig) -> PromptFormat:
    """The format that `prompt.format` names."""
    return FORMATS[cfg.format](cfg)
