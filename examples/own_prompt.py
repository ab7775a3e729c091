"""A prompt format of one's own: `prompt=custom prompt.factory=examples.own_prompt:Lines`. Two lines, no JSON."""

import re
from collections.abc import Sequence

from vlm_agents.config import PromptConfig
from vlm_agents.prompting import chat, match_action
from vlm_agents.types import Observation, Parsed, Prompt, Turn

RULE = "Answer in two lines: Because: <your thoughts>, then Do: <action>."


class Lines:
    """`Because: the door is shut` and, in the next line, `Do: open`."""

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        """`chat` tells of earlier turns as `prompt.history` wants it."""
        return chat(f"{instructions}\n{RULE}", history, now, self.cfg)

    def parse(self, text: str, legal_actions: tuple[str, ...] | None) -> Parsed:
        """Never raises, never guesses. The spans say which characters are thought and which are the action."""
        thought = re.search(r"^Because: (.*)$", text, re.MULTILINE)
        done = re.search(r"^Do: (.*)$", text, re.MULTILINE)
        span = thought.span(1) if thought else None
        if done is None:
            return Parsed(None, span, error="no answer")
        action, error = match_action(done[1], legal_actions)
        return Parsed(action, span, done.span(1), error)

    def write(self, thought: str, action: str, legal_actions: tuple[str, ...] | None) -> str:
        """What an expert that thinks this and does that would have answered: SFT's target."""
        return f"Because: {thought}\nDo: {action}"
