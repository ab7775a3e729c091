r"""Python in a fence, as Markdown has it, and an answer in a box, as LaTeX has it: the actions of an agent with a tool.

fenced("print(1)") -> "```python\nprint(1)\n```"        boxed("3") -> "\\boxed{3}"
"""

import re
from collections.abc import Iterator

from vlm_agents.types import Span

OPENED = r"```(?i:py(?:thon)?3?)?[ \t]*\r?\n"
WHOLE = re.compile(rf"\s*{OPENED}(.*?)(?:\r?\n)?[ \t]*```\s*", re.DOTALL)
OPENING = re.compile(OPENED)
# code may hold ``` itself
CLOSINGS = re.compile(r"(?:\r?\n)?^[ \t]*```[ \t]*\r?$", re.MULTILINE), re.compile("```")
BRACE = re.compile(r"(?<!\\)[{}]")
BOX = "\\boxed{"


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def unfenced(text: str) -> str | None:
    """The code of a text that is a fence and nothing else."""
    found = WHOLE.fullmatch(text)
    return found[1] if found else None


def last_fence(text: str, begin: int, end: int) -> Span | None:
    """Where the inside of the last fence within the range lies: one that ends on a line of its own, if there is any."""
    for closing in CLOSINGS:
        if found := list(_fences(closing, text, begin, end)):
            return found[-1]
    return None


def _fences(closing: re.Pattern[str], text: str, begin: int, end: int) -> Iterator[Span]:
    while opened := OPENING.search(text, begin, end):
        closed = closing.search(text, opened.end(), end)
        if not closed:  # nor is any that opens behind it
            return
        yield opened.end(), closed.start()
        begin = closed.end()


def boxed(answer: str) -> str:
    return f"{BOX}{answer}}}"


def unboxed(text: str) -> str | None:
    """What is in the last box of a text, if one is closed."""
    found = last_box(text, 0, len(text))
    return text[slice(*found)].strip() if found else None


def last_box(text: str, begin: int, end: int) -> Span | None:
    r"""Where the inside of the last closed box within the range lies. Braces in it pair up; `\{` and `\}` are none."""
    opened, last = list[int](), None
    for brace in BRACE.finditer(text, begin, end):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            inside = opened.pop()
            if text.endswith(BOX, begin, inside) and (last is None or inside > last[0]):
                last = inside, brace.start()
    return last
