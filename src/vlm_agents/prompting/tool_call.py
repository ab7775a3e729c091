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

from vlm_agents.config import PromptConfig
from vlm_agents.prompting.base import LegalActions, match_action, quoted
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.types import Message, Observation, Parsed, Part, Prompt, Span, Turn

RULE = r"""Think first. Then write either Python to be run:
<code>
```python
...
```
</code>
or, to end, the answer:
<answer>
\boxed{...}
</answer>"""
BLOCK = re.compile(r"<(code|answer)>(.*?)</\1>", re.DOTALL)
OPEN = re.compile(r"<(?:code|answer)>")
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
BOX = "\\boxed{"


class ToolCall:
    """The last block of a reply counts. A fence or a box that stands in no block is read as if it did."""

    stop = ("</code>",)

    def __init__(self, cfg: PromptConfig) -> None:
        self.cfg = cfg

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        """One user asks; what comes of actions is a tool's: a chat can't lose the question, however long it is."""
        messages = [Message("system", (f"{instructions}\n{RULE}",)), Message("user", _first(history, now).parts)]
        for turn in history:
            messages.append(Message("assistant", (turn.reply.text,), token_ids=turn.reply.token_ids or None))
            messages.append(Message("tool", _response(turn.step.observation.parts)))
        return tuple(messages)

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        start, error = answer_start(text)
        blocks = [] if error else list(BLOCK.finditer(text, start))
        kind, span, begin = _block(text, blocks[-1]) if blocks else _bare(text, start)
        thought = (0, begin) if kind and begin else (0, start) if start else None
        if error or kind is None:
            cut = OPEN.search(text, start)
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


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def boxed(answer: str) -> str:
    return f"{BOX}{answer}}}"


def _first(history: Sequence[Turn], now: Observation) -> Observation:
    return history[0].observation if history else now


def _response(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """As PyVision tells what came of code."""
    return "<tool_response>\n<interpreter>\n", *parts, "\n</interpreter>\n</tool_response>"


def _block(text: str, block: re.Match[str]) -> tuple[str, Span, int]:
    """What a block is, where that which it says stands, and where the block begins."""
    kind, (begin, end) = block[1], block.span(2)
    if kind == "code":
        fences = list(FENCE.finditer(text, begin, end))
        return kind, fences[-1].span(1) if fences else (begin, end), block.start()
    return kind, _box(text, begin, end) or (begin, end), block.start()


def _bare(text: str, start: int) -> tuple[str | None, Span, int]:
    """The same where there is no block: of the last fence, or of the last box where it stands behind that."""
    fences, box = list(FENCE.finditer(text, start)), _box(text, start, len(text))
    if box and not (fences and fences[-1].end() > box[1]):
        return "answer", box, box[0] - len(BOX)
    if fences:
        return "code", fences[-1].span(1), fences[-1].start()
    return None, (start, start), start


def _trimmed(text: str, span: Span, characters: str | None) -> Span:
    """Without these characters, or white space, at its ends."""
    begin, end = span
    bare = text[begin:end].strip(characters)
    begin = text.index(bare, begin, end)
    return begin, begin + len(bare)


def _box(text: str, begin: int, end: int) -> Span | None:
    """Where the inside of the last box lies that is closed, braces within it included."""
    first = text.rfind(BOX, begin, end)
    while first >= 0:
        depth, inside = 1, first + len(BOX)
        for place in range(inside, end):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return inside, place
        first = text.rfind(BOX, begin, first)
    return None
