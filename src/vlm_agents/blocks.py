r"""Python in a fence, as Markdown has it, and an answer in a box, as LaTeX has it: the actions of an agent with a tool.

fenced("print(1)") -> "```python\nprint(1)\n```"        boxed("3") -> "\\boxed{3}"
"""

import re

from vlm_agents.types import Span

OPENED = r"```(?i:py(?:thon)?3?)?[ \t]*\r?\n"
WHOLE = re.compile(rf"\s*{OPENED}(.*?)(?:\r?\n)?[ \t]*```\s*", re.DOTALL)
# code may hold ``` itself
LINES = re.compile(rf"{OPENED}(.*?)(?:\r?\n)?^[ \t]*```[ \t]*\r?$", re.DOTALL | re.MULTILINE)
LOOSE = re.compile(rf"{OPENED}(.*?)```", re.DOTALL)
BOX = "\\boxed{"


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def unfenced(text: str) -> str | None:
    """The code of a text that is a fence and nothing else."""
    found = WHOLE.fullmatch(text)
    return found[1] if found else None


def last_fence(text: str, begin: int, end: int) -> Span | None:
    """Where the inside of the last fence within the range lies: one that ends on a line of its own, if there is any."""
    for kind in (LINES, LOOSE):
        if found := list(kind.finditer(text, begin, end)):
            return found[-1].span(1)
    return None


def boxed(answer: str) -> str:
    return f"{BOX}{answer}}}"


def unboxed(text: str) -> str | None:
    """What is in the last box of a text, if one is closed."""
    found = last_box(text, 0, len(text))
    return text[slice(*found)].strip() if found else None


def last_box(text: str, begin: int, end: int) -> Span | None:
    r"""Where the inside of the last closed box within the range lies. Braces in it pair up; `\{` and `\}` are none."""
    first = text.rfind(BOX, begin, end)
    while first >= 0:
        depth, inside = 1, first + len(BOX)
        for place in range(inside, end):
            if text[place] in "{}" and text[place - 1] != "\\":
                depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return inside, place
        first = text.rfind(BOX, begin, first)
    return None
