"""How the agent is asked, and how it answers."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting


@dataclass
class PromptConfig(Part, place="prompt"):
    format: str = setting(
        MISSING,
        "what a reply looks like; chosen by prompt=",
        choices=Literal["cot_json", "action_only", "action_scores", "rl4vlm"],
    )
    history: str = setting(
        "last_k",
        "what the prompt tells of earlier turns: nothing; the last actions and what they did, as text; the whole chat",
        choices=Literal["none", "last_k", "full"],
    )
    last_k: int = setting(4, "actions that history=last_k tells", low=1)
    max_prompt_tokens: int | None = setting(
        None, "a longer chat loses its oldest turns; null: the model's positions bound it", low=1
    )
    max_reply_tokens: int = setting(96, "a longer reply is cut off there", low=1)
    score_temperature: float = setting(
        0.5, "format=action_scores only: softmax temperature over the scores 1-5", positive=True
    )
