"""Replies as RL4VLM reads them, for comparison with its numbers: a JSON object by looks alone.

Whatever stands behind the first `"action":` after the thinking, if there is any, is searched for every action as a
substring, so "white" holds a "hit" and "11" a "1". Nothing here is better for that; `cot_json` is the format to train
with.
"""

import json
import re
from collections.abc import Sequence

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, chat
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.types import Observation, Parsed, Prompt, Turn

KEY = re.compile('"action":', re.IGNORECASE | re.ASCII)


class RL4VLM:
    """The action is the one word that is found behind the key. All before the key are the thoughts."""

    stop = ()

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return chat(f"{instructions}\n{rule(now.legal_actions)}", history, now, self.cfg)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        start, _ = answer_start(text)
        key = KEY.search(text, start)
        found = words_in(text[key.end() :] if key else text[start:][-1:], legal_actions or ())
        action = found[0] if len(found) == 1 else None
        error = None if action else "several actions" if found else "no legal action" if key else "no action key"
        if key is None:
            return Parsed(action, error=error)
        return Parsed(action, (0, key.start()), (key.start(), len(text)), error)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        """Without the keys that name what is seen: the thought does."""
        return json.dumps({"thoughts": thought, "action": action}, ensure_ascii=False)


def rule(legal_actions: LegalActions) -> str:
    """The keys of a reply, which differ from game to game; the game is told by its actions."""
    legal = legal_actions or ()
    seen = ("cards", "current formula") if "=" in legal else ("current number", "target number") if "+" in legal else ()
    fields = [f'"{key}": <what you see>' for key in seen]
    fields += ['"thoughts": "<say what you see, then think step by step>"', '"action": "<one of the actions>"']
    return f"Answer with one JSON object: {{{', '.join(fields)}}}"


def words_in(text: str, legal_actions: Sequence[str]) -> list[str]:
    """The actions that stand in `text`; a longer one, such as `10`, is taken out before those within it, such as `1`,
    are sought. One of several words stands there as words: `go to drawer 10` is no `go to drawer 1`, though that may be
    all that is legal. A single word stands there by its letters."""
    text = text.lower()
    found = []
    for action in sorted(legal_actions, key=len, reverse=True):
        sought = re.escape(action.lower())
        text, count = re.subn(rf"(?<!\w){sought}(?!\w)" if " " in action else sought, " ", text)
        if count:
            found.append(action)
    return found
