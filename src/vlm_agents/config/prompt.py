"""How the agent is asked, and how it answers."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from vlm_agents.config.fields import Part, setting
from vlm_agents.errors import ConfigError


@dataclass
class PromptConfig(Part, place="prompt"):
    format: str = setting(
        MISSING,
        "what a reply looks like; chosen by prompt=",
        choices=Literal["cot_json", "action_only", "action_scores", "rl4vlm", "tool_call", "boxed", "custom"],
    )
    history: str = setting(
        "last_k",
        "what the prompt tells of earlier turns: nothing; the last actions and whether they did something; the last "
        "actions and what was seen before each, as text; the whole chat",
        choices=Literal["none", "last_k", "answers", "full"],
    )
    last_k: int = setting(4, "actions that history=last_k and answers tell", low=1)
    show_actions: bool | None = setting(
        None, "list the legal actions below what is seen; null: where the env's differ from turn to turn"
    )
    max_prompt_tokens: int | None = setting(
        None,
        "a longer chat loses its oldest turns, or, with tool_call and boxed, ends its episode; null: the model's "
        "positions bound it",
        low=1,
    )
    max_reply_tokens: int = setting(96, "a longer reply is cut off there", low=1)
    score_temperature: float = setting(
        0.5, "format=action_scores only: softmax temperature over the scores 1-5", positive=True
    )
    factory: str | None = setting(
        None, "format=custom only: package.module:attribute that is called with these settings and gives the format"
    )

    @property
    def whole(self) -> bool:
        """Does a chat begin with a question, without which the rest has no sense?"""
        return self.format in ("tool_call", "boxed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole and self.history != "full":
            raise ConfigError(
                f"prompt.history={self.history} would leave out what was asked: with prompt={self.format} it is full"
            )
        if self.factory is not None and self.format != "custom":
            raise ConfigError(f"prompt.factory={self.factory} is a format of its own: add prompt=custom")
        if self.factory is None and self.format == "custom":
            raise ConfigError("prompt=custom is a format of your own: give prompt.factory=my_package.my_module:Mine")
