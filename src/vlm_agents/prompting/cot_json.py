"""Think, then act: `{"thoughts": "...", "action": "turn left"}`."""

import json
from collections.abc import Sequence

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, chat, cut_off, find_object, match_action, quoted
from vlm_agents.types import Observation, Parsed, Prompt, Turn

RULE = 'Answer in JSON: {"thoughts": "...", "action": "..."}'


class CotJson:
    """The action is the value of the key `action`."""

    stop = ()

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return chat(f"{instructions}\n{RULE}", history, now, self.cfg)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        found = find_object(text, "action")
        if found.answer is None:
            return Parsed(None, found.thought_span, error=found.error)
        action, error = match_action(found.answer.value, legal_actions)
        if action is not None and cut_off(text, action, found.answer.span, legal_actions):
            action, error = None, f"cut off after {quoted(action)}"
        return Parsed(action, found.thought_span, found.answer.span, error)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        return json.dumps({"thoughts": thought, "action": action}, ensure_ascii=False)
