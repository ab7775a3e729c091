"""What a policy is told and how its reply is read. Knows no env, no model and no tensor.

A new format is a module with a class that has the three methods of `PromptFormat`, a line in `FORMATS`, its name in
`PromptConfig` and a YAML in conf/prompt/.
"""

__all__ = ["Fitted", "PromptFormat", "drawn", "make_format"]

from collections.abc import Callable

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.action_only import ActionOnly
from vlm_agents.prompting.action_scores import ActionScores
from vlm_agents.prompting.base import Fitted, PromptFormat, drawn
from vlm_agents.prompting.cot_json import CotJson
from vlm_agents.prompting.rl4vlm import RL4VLM

FORMATS: dict[str, Callable[[PromptConfig], PromptFormat]] = {
    "cot_json": CotJson,
    "action_only": ActionOnly,
    "action_scores": ActionScores,
    "rl4vlm": RL4VLM,
}


def make_format(cfg: PromptConfig) -> PromptFormat:
    """The format that `prompt.format` names."""
    return FORMATS[cfg.format](cfg)
