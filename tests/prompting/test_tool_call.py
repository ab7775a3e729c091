r"""`tool_call`: replies with Python or a boxed answer, and the chat with what code gave."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_agents.blocks import last_box, last_fence
from vlm_agents.config import PromptConfig
from vlm_agents.errors import ConfigError
from vlm_agents.pictures import Picture
from vlm_agents.prompting import check_format, make_format
from vlm_agents.prompting.tool_call import last_block
from vlm_agents.types import Message, Observation, Parsed, Reply, Step, Turn

FORMAT = make_format(PromptConfig(format="tool_call", history="full"))
CODE = "I look.\n<code>\n```python\nprint(1)\n```\n</code>"
ANSWER = "It is red.\n<answer>\n\\boxed{red}\n</answer>"
PRINT = "```python\nprint(1)\n```"


def read(text: str) -> tuple[str | None, str | None, str | None]:
    """Action, error, and what the action's span covers."""
    parsed = FORMAT.parse(text, None)
    return parsed.action, parsed.error, parsed.action_span and text[slice(*parsed.action_span)]


def test_what_is_written_is_read() -> None:
    assert FORMAT.write("I look.", PRINT, None) == CODE
    assert FORMAT.write("It is red.", "\\boxed{red}", None) == FORMAT.write("It is red.", "red", None) == ANSWER
    assert FORMAT.parse(CODE, None) == Parsed(PRINT, (0, 8), (25, 33))  # "I look.\n"; then "<code>\n```python\n" is 17
    assert FORMAT.parse(ANSWER, None) == Parsed("\\boxed{red}", (0, 11), (27, 30))  # "<answer>\n\\boxed{" is 16
    check_format(FORMAT)  # with an env that lists its actions, too
    assert FORMAT.parse(FORMAT.write("", "turn left", ("turn left",)), ("turn left",)).action == "turn left"
    assert FORMAT.parse(CODE, ("turn left",)).error == "illegal action 'print(1)'"


@pytest.mark.parametrize(
    ("text", "action", "covered"),
    [
        ("<answer>red</answer>", "\\boxed{red}", "red"),  # in no box
        ("<answer>\\boxed{\\frac{1}{2}}</answer>", "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("<answer>\\boxed{a} or \\boxed{b}</answer>", "\\boxed{b}", "b"),
        ("so \\boxed{7}.", "\\boxed{7}", "7"),
        ("\\boxed{7} and \\boxed{8", "\\boxed{7}", "7"),  # the last one isn't closed
        ("<code>\nprint(1)\n</code>", PRINT, "print(1)"),  # without a fence
        ("<code>```py\nprint(1)```</code>", PRINT, "print(1)"),
        ("<code>\n```Python3\r\nprint(1)\r\n```\n</code>", PRINT, "print(1)"),
        ("<code>\n```python\nx = '```'\n```\n</code>", "```python\nx = '```'\n```", "x = '```'"),
        ("<answer>\\boxed{\\{1}</answer>", "\\boxed{\\{1}", "\\{1"),
        ("```python\nx\n```\nthen\n```python\nprint(1)\n```", PRINT, "print(1)"),
        ("\\boxed{7}\n```python\nprint(1)\n```", PRINT, "print(1)"),
        ("```python\nx\n```\n\\boxed{7}", "\\boxed{7}", "7"),
        ("<answer>red</answer> no\n<code>\nprint(1)\n</code>", PRINT, "print(1)"),  # the last block counts
        ("<think><answer>a draft</answer></think><answer>red</answer>", "\\boxed{red}", "red"),
        (
            "<code>\n```python\nprint('</answer>')\n```\n</code>",
            "```python\nprint('</answer>')\n```",
            "print('</answer>')",
        ),
        (
            "<code>\n```python\nif 1:\n    print(1)\n```\n</code>",
            "```python\nif 1:\n    print(1)\n```",
            "if 1:\n    print(1)",
        ),
    ],
)
def test_what_is_spelled_in_other_ways_is_read(text: str, action: str, covered: str) -> None:
    assert read(text) == (action, None, covered)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty reply"),
        ("<think>so", "no answer"),
        ("It is red.", "no code or answer"),
        ("I look.\n<code>\nprint(", "cut off after '<code>\\nprint('"),
        ("Is it \\boxed{red}? I look.\n<code>\nprint(", "cut off after '<code>\\nprint('"),
        ("<answer>\n\\boxed{red}\n</answer> or\n<code>\nprint(", "cut off after '<code>\\nprint('"),
        ("<answer>\n\\boxed{re", "cut off after '<answer>\\n\\\\boxed{re'"),
        ("<code>\n```python\n\n```\n</code>", "empty action"),
        ("<answer> </answer>", "empty action"),
        ("\\boxed{}", "empty action"),
    ],
)
def test_what_holds_no_action_has_an_error(text: str, error: str) -> None:
    parsed = FORMAT.parse(text, None)
    assert (parsed.action, parsed.error) == (None, error)


PIECES = ["<code>", "</code>", "<answer>", "</answer>", "<think>", "</think>", "```python\n", "```", "\\boxed{"]
PIECES += ["}", "x", "\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_whatever_is_said_is_an_action_or_an_error(text: str) -> None:
    parsed = FORMAT.parse(text, None)
    assert (parsed.action is None) == (parsed.error is not None)
    if parsed.action is not None:
        assert parsed.action_span is not None
        inside = text[slice(*parsed.action_span)].strip()
        assert inside
        assert inside in parsed.action
        assert FORMAT.parse(FORMAT.write("so", parsed.action, None), None).error is None


def test_the_chat_tells_what_code_gave_as_a_tool() -> None:
    whole, cut = (Picture(Image.new("RGB", (2, 2), color)) for color in ("red", "blue"))
    asked = Observation("<image_clue_0></image_clue_0>\nWhich?", (whole,), places=(14,))
    shown = Observation("Image Result:\n<image_clue_1></image_clue_1>", (cut,), places=(28,))
    step = Step(shown, 0.0, terminated=False, truncated=False, success=False, legal=True, changed=True)
    turn = Turn(asked, (), Reply(CODE, token_ids=(5, 6)), FORMAT.parse(CODE, None), step)
    system, question, code, result = FORMAT.prompt("Rules.", [turn], shown)
    assert system.text.startswith("Rules.\nThink first.")
    assert question == Message("user", ("<image_clue_0>", whole, "</image_clue_0>\nWhich?"))
    assert code == Message("assistant", (CODE,), token_ids=(5, 6))
    assert result.role == "tool"
    assert result.parts == (
        "<tool_response>\n<interpreter>\n",
        "Image Result:\n<image_clue_1>",
        cut,
        "</image_clue_1>",
        "\n</interpreter>\n</tool_response>",
    )
    assert result.speaker == "user"  # as PyVision's chats have it
    assert FORMAT.stop == ("</code>",)


def test_without_a_tool_it_is_told_of_none() -> None:
    (system, _) = make_format(PromptConfig("boxed", "full")).prompt("Rules.", (), Observation("Which?"))
    assert system.text == "Rules.\nThink first. Then write the answer:\n<answer>\n\\boxed{...}\n</answer>"


@pytest.mark.parametrize("name", ["tool_call", "boxed"])
def test_a_chat_without_its_past_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="history=none would leave out what was asked"):
        PromptConfig(format=name, history="none")


@pytest.mark.parametrize("loop", ["\\boxed{", "```python\n", "{\\boxed{a"])
def test_a_reply_that_loops_is_read_at_once(loop: str) -> None:
    """Quadratic time would take hours."""
    text = loop * 200_000
    assert last_box(text, 0, len(text)) is None
    last_fence(text, 0, len(text))


@given(st.lists(st.sampled_from(["<code>", "</code>", "<answer>", "</answer>", "a", "\n"]), max_size=12).map("".join))
def test_the_last_block_is_the_one_that_a_regex_finds(text: str) -> None:
    blocks = list(re.finditer(r"<(code|answer)>(.*?)</\1>", text, re.DOTALL))
    expected = (blocks[-1][1], blocks[-1].span(2), blocks[-1].start()) if blocks else None
    assert last_block(text, 0) == expected


def test_a_reply_that_opens_blocks_without_end_is_read_at_once() -> None:
    """Quadratic time would take hours."""
    for text in ("<code>" * 300_000, "<answer>" * 300_000 + "</code>" * 300_000):
        assert FORMAT.parse(text, None).action is None
