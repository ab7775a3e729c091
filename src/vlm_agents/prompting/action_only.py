"""The bare action as the whole reply, no thoughts."""

from collections.abc import Sequence

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, chat, match_action
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.types import Observation, Parsed, Prompt, Turn

RULE = "Answer with the action only."


class ActionOnly:
    """The action is everything behind the thinking, but for the white space around it."""

    stop = ()

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return chat(f"{instructions}\n{RULE}", history, now, self.cfg)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        start, error = answer_start(text)
        thought = (0, start) if start else None
        if error:
            return Parsed(None, thought, error=error)
        value = text[start:].strip()
        begin = text.index(value, start)
        action, error = match_action(value, legal_actions)
        return Parsed(action, thought, (begin, begin + len(value)), error)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        return action
