"""Where a reply's answer begins: behind what a reasoning model writes first, drafts of answers among it.

The marks are those of chat templates and of the usual prompts. It knows no format.
"""

import re

from vlm_agents.prompting.objects import is_json, objects_in

# Qwen3, DeepSeek-R1, GLM and others; asked for by prompts; Magistral; Kimi-VL
MARK = re.compile(r"<(/?)think>|<(/?)thinking>|\[(/?)THINK\]|◁(/?)think▷")


def answer_start(text: str) -> tuple[int, str | None]:
    """The position behind the thinking, 0 without any; and an error where no answer stands there.

    The last mark decides. A closing one needs none that opens, for some templates open the thinking in the prompt.
    Behind an opening one everything is thinking, cut off. Marks inside an object of sound JSON are text.
    """
    start = 0
    if MARK.search(text):
        for mark in MARK.finditer(_without_objects(text)):
            start = mark.end() if any(mark.groups()) else len(text)
    if text[start:].strip():
        return start, None
    return start, "no answer" if start else "empty reply"


def _without_objects(text: str) -> str:
    """The text with blanks in place of the objects that are sound JSON."""
    parts, end = [], 0
    for _, (first, last) in objects_in(text):
        if is_json(text[first:last]):
            parts += [text[end:first], " " * (last - first)]
            end = last
    return "".join((*parts, text[end:]))
