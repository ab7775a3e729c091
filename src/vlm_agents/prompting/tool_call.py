r"""Think, then write Python or the answer, as PyVision has it:

    I look closer.                          It is red.
    <code>                                  <answer>
    ```python                               \boxed{red}
    image_clue_0.crop((0, 0, 9, 9)).show()  </answer>
    ```
    </code>

The whole chat is shown, what code gave in turns of its own. The action is the fenced Python, or the boxed answer.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vlm_agents.blocks import BOX, boxed, fenced, last_box, last_fence
from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, match_action, quoted
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.types import Message, Observation, Parsed, Part, Prompt, Span, Turn

ANSWER = r"""<answer>
\boxed{...}
</answer>"""
TOOL_RULE = f"""Think first. Then write either Python to be run:
<code>
```python
...
```
</code>
or, to end, the answer:
{ANSWER}"""
ANSWER_RULE = f"Think first. Then write the answer:\n{ANSWER}"
OPEN = re.compile(r"<(code|answer)>")


class ToolCall:
    """The last block of a reply counts. A fence or a box that stands in no block is read as if it did.

    With `prompt=boxed` the agent is told of no Python, and all else is the same.
    """

    stop = ("</code>",)

    def __init__(self, cfg: PromptConfig) -> None:
        self.rule = TOOL_RULE if cfg.format == "tool_call" else ANSWER_RULE

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        """One user asks; what comes of actions is a tool's: a chat can't lose the question, however long it is."""
        messages = [Message("system", (f"{instructions}\n{self.rule}",)), Message("user", _first(history, now).parts)]
        for turn in history:
            messages.append(Message("assistant", (turn.reply.text,), token_ids=turn.reply.token_ids or None))
            messages.append(Message("tool", _response(turn.step.observation.parts)))
        return tuple(messages)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        start, error = answer_start(text)
        block = None if error else last_block(text, start)
        kind, span, begin = _block(text, block) if block else _bare(text, start)
        thought = (0, begin) if kind and begin else (0, start) if start else None
        behind = block.inside[1] if block else span[1]
        cut = OPEN.search(text, behind)  # a block that has no end: what came before it isn't meant
        if error or kind is None or cut:
            told = error or (f"cut off after {quoted(text[cut.start() :])}" if cut else "no code or answer")
            return Parsed(None, thought, error=told)
        span = _trimmed(text, span, "\n" if kind == "code" else None)
        said = text[slice(*span)]
        if not said.strip():
            return Parsed(None, thought, span, "empty action")
        if legal_actions is not None:
            action, error = match_action(said, legal_actions)
            return Parsed(action, thought, span, error)
        return Parsed(fenced(said) if kind == "code" else boxed(said), thought, span)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        if legal_actions is None and action.startswith("```"):
            return f"{thought}\n<code>\n{action}\n</code>"
        return f"{thought}\n<answer>\n{action if action.startswith(BOX) else boxed(action)}\n</answer>"


def _first(history: Sequence[Turn], now: Observation) -> Observation:
    return history[0].observation if history else now


def _response(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """As PyVision tells what came of code."""
    return "<tool_response>\n<interpreter>\n", *parts, "\n</interpreter>\n</tool_response>"


class Block(NamedTuple):
    """A `code` or `answer`, where that which it says stands, and where the block begins."""

    kind: str
    inside: Span
    start: int


def last_block(text: str, start: int) -> Block | None:
    """Of those one after another, each ended by the first end of its kind. In linear time: a model may write an opening
    again and again, and what has no end once has none later."""
    found, endless = None, set[str]()
    while opened := OPEN.search(text, start):
        kind, start = opened[1], opened.end()
        end = -1 if kind in endless else text.find(f"</{kind}>", start)
        if end < 0:
            endless.add(kind)
            continue
        found = Block(kind, (start, end), opened.start())
        start = end + len(f"</{kind}>")
    return found


def _block(text: str, block: Block) -> tuple[str, Span, int]:
    """What a block is, where its code or answer stands, and where the block begins."""
    last = last_fence if block.kind == "code" else last_box
    return block.kind, last(text, *block.inside) or block.inside, block.start


def _bare(text: str, start: int) -> tuple[str | None, Span, int]:
    """The same where there is no block: of the last fence, or of the last box where it stands behind that."""
    fence, box = last_fence(text, start, len(text)), last_box(text, start, len(text))
    if box and not (fence and fence[1] > box[1]):
        return "answer", box, box[0] - len(BOX)
    if fence:
        return "code", fence, text.rindex("```", start, fence[0])
    return None, (start, start), start


def _trimmed(text: str, span: Span, characters: str | None) -> Span:
    """Without these characters, or white space, at its ends."""
    begin, end = span
    bare = text[begin:end].strip(characters)
    begin = text.index(bare, begin, end)
    return begin, begin + len(bare)
