"""What a policy is told and how its reply is read. Knows no env, no model and no tensor.

A new format is a module with a class that has what `PromptFormat` names, a line in `FORMATS`, its name in
`PromptConfig` and a YAML in conf/prompt/. Outside the package it is the class alone, and `prompt.factory` names it.
"""

__all__ = [
    "WITHOUT_TOOL",
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
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from vlm_agents.config import PromptConfig
from vlm_agents.errors import ConfigError, VlmAgentsError
from vlm_agents.imports import made, told
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
from vlm_agents.prompting.tool_call import ToolCall

FORMATS: dict[str, Callable[[PromptConfig], PromptFormat]] = {
    "cot_json": CotJson,
    "action_only": ActionOnly,
    "action_scores": ActionScores,
    "rl4vlm": RL4VLM,
    "tool_call": ToolCall,
    "boxed": ToolCall,
}


def custom(cfg: PromptConfig) -> PromptFormat:
    """The user's own format; ConfigError where that isn't one, and for what it raises whenever it is called."""
    name, methods = f"prompt.factory={cfg.factory}", ("prompt", "parse", "write")
    found = made("prompt.factory", str(cfg.factory), cfg, needs=methods)
    check_format(found, name)
    guards = {method: partial(_guarded, name, getattr(found, method)) for method in methods}
    return cast(PromptFormat, SimpleNamespace(stop=tuple(getattr(found, "stop", ())), **guards))


def _guarded(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except VlmAgentsError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: {told(error)}") from error


FORMATS["custom"] = custom


WITHOUT_TOOL = {"tool_call": "boxed"}  # how an agent is asked that has no tool, by how it is asked with one


def make_format(cfg: PromptConfig) -> PromptFormat:
    """The format that `prompt.format` names."""
    return FORMATS[cfg.format](cfg)
