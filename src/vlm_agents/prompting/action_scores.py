"""Score every action from 1 to 5 and draw one: `{"thoughts": "...", "scores": {"turn left": 1, "turn right": 5}}`."""

import json
from collections.abc import Sequence

import numpy as np

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, chat, find_object, match_action, quoted
from vlm_agents.prompting.objects import read_object
from vlm_agents.types import Observation, Parsed, Prompt, Turn

RULE = 'Score each action 1-5 in JSON: {"thoughts": "...", "scores": {"<action>": 3, ...}}'
LOW, HIGH = 1, 5


class ActionScores:
    """The action is drawn from softmax(scores / score_temperature); the action span is the whole scores object."""

    stop = ()

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return chat(f"{instructions}\n{RULE}", history, now, self.cfg)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        found = find_object(text, "scores")
        if found.answer is None:
            return Parsed(None, found.thought_span, error=found.error)
        scores, error = read_scores(text, found.answer.span[0], legal_actions)
        choices = {} if error else softmax(scores, self.cfg.score_temperature)
        return Parsed(None, found.thought_span, found.answer.span, error, choices)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        scores = {name: HIGH if name == action else LOW for name in legal_actions or (action,)}
        return json.dumps({"thoughts": thought, "scores": scores}, ensure_ascii=False)


def read_scores(text: str, start: int, legal_actions: LegalActions) -> tuple[dict[str, float], str | None]:
    """The score of every legal action, in their order, from the object at `start`; or what is wrong with it."""
    scores: dict[str, float] = {}
    for name, value, _ in read_object(text, start)[0]:
        action, error = match_action(name, legal_actions)
        if action is None:
            return {}, error
        try:
            scores[action] = float(value)
        except ValueError:
            scores[action] = np.nan
        if not LOW <= scores[action] <= HIGH:
            return {}, f"bad score {quoted(value)}"
    actions = scores if legal_actions is None else legal_actions
    for action in actions:
        if action not in scores:
            return {}, f"no score for {quoted(action)}"
    return {action: scores[action] for action in actions}, None if scores else "no scores"


def softmax(scores: dict[str, float], temperature: float) -> dict[str, float]:
    """The probability of each action, softmax(scores / temperature)."""
    logits = np.array(list(scores.values()))
    weights = np.exp((logits - logits.max()) / temperature)
    return dict(zip(scores, (weights / weights.sum()).tolist(), strict=True))
