"""How replies are read: canonical round trips, a table of malformed ones, action matching, drawing by scores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vlm_agents.config import PromptConfig
from vlm_agents.errors import ConfigError
from vlm_agents.prompting import PromptFormat, drawn, make_format
from vlm_agents.types import Parsed, Span

LEGAL = ("turn left", "turn right", "go forward", "hit", "10", "-", "+")
THOUGHTS = (
    "agent (1,2) facing right; key (3,1)",
    "",
    'the "red" key',
    "it's {here}, [there]: a\\b / c",
    "line one\nline two\ttabbed",
    "größe 日本 \u2028 \U0001f511 \x7f",
    "lone \ud83d surrogate",
    'then "action": "hit" or\n"action": "10"}',
    "ends with a backslash \\",
    '", "action": "hit',
)


def prompt_format(name: str, temperature: float = 0.5) -> PromptFormat:
    return make_format(PromptConfig(format=name, score_temperature=temperature))


def parse(name: str, text: str, legal: tuple[str, ...] | None = LEGAL, seed: int = 0) -> Parsed:
    return drawn(prompt_format(name).parse(text, legal), np.random.default_rng(seed))


def cut(text: str, span: Span | None) -> str:
    assert span is not None
    return text[slice(*span)]


# ---- canonical replies -----------------------------------------------------------------------------------------------
def test_canonical_texts() -> None:
    assert prompt_format("cot_json").write("größe", "hit", LEGAL) == '{"thoughts": "größe", "action": "hit"}'
    assert prompt_format("action_only").write("größe", "hit", LEGAL) == "hit"
    assert (
        prompt_format("action_scores").write("größe", "hit", ("hit", "stand"))
        == '{"thoughts": "größe", "scores": {"hit": 5, "stand": 1}}'
    )


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("action", LEGAL)
def test_cot_json_round_trip(thought: str, action: str) -> None:
    text = prompt_format("cot_json").write(thought, action, LEGAL)
    parsed = parse("cot_json", text)
    assert (parsed.action, parsed.error) == (action, None)
    assert cut(text, parsed.action_span) == action
    assert cut(text, parsed.thought_span) == json.dumps(thought, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize("action", LEGAL)
def test_action_only_round_trip(action: str) -> None:
    text = prompt_format("action_only").write("unsaid", action, LEGAL)
    assert parse("action_only", text) == Parsed(action, None, (0, len(action)))


@pytest.mark.parametrize("thought", THOUGHTS)
def test_action_scores_round_trip(thought: str) -> None:
    text = prompt_format("action_scores", 0.01).write(thought, "hit", LEGAL)
    # At temperature 0.01 another action has probability e^-400.
    parsed = drawn(prompt_format("action_scores", 0.01).parse(text, LEGAL), np.random.default_rng(0))
    assert (parsed.action, parsed.error) == ("hit", None)
    assert json.loads(cut(text, parsed.action_span)) == {name: 5 if name == "hit" else 1 for name in LEGAL}
    assert cut(text, parsed.thought_span) == json.dumps(thought, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize(
    "layout", [{"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, {"ensure_ascii": True}]
)
@pytest.mark.parametrize("thought", THOUGHTS)
def test_spans_hold_in_any_layout(thought: str, layout: dict) -> None:
    text = "  Sure:\n" + json.dumps({"thoughts": thought, "action": "hit", "note": [{"}": "{"}]}, **layout) + "\nDone."
    parsed = parse("cot_json", text)
    assert (parsed.action, cut(text, parsed.action_span)) == ("hit", "hit")
    assert json.loads(f'"{cut(text, parsed.thought_span)}"') == thought


@pytest.mark.parametrize("gap", [" ", "", "\n", "\n    ", " \t "])
def test_spans_hold_whatever_stands_before_a_key(gap: str) -> None:
    text = f'{{"thoughts":{gap}"see \\"action\\": \\"10\\"",{gap}"action":{gap}"turn left"{gap}}}'
    parsed = parse("cot_json", text)
    assert (parsed.action, cut(text, parsed.action_span)) == ("turn left", "turn left")
    assert cut(text, parsed.thought_span) == r"see \"action\": \"10\""
    start = text.rindex("turn left")
    assert parsed.action_span == (start, start + 9)


def test_escapes_in_key_and_action_are_read() -> None:
    text = r'{"\u0061ction": "turn\u0020left"}'
    parsed = parse("cot_json", text)
    assert (parsed.action, cut(text, parsed.action_span)) == ("turn left", r"turn\u0020left")


# ---- malformed replies -----------------------------------------------------------------------------------------------
CANONICAL = '{"thoughts": "so", "action": "turn left"}'
# reply, action, error: exactly one of the two
MALFORMED = [
    # no reply, no JSON
    ("", None, "empty reply"),
    (" \n\t\u3000", None, "empty reply"),
    ("turn left", None, "no JSON"),
    ('"action": "turn left"', None, "no JSON"),
    ('["turn left"]', None, "no JSON"),
    ("{", None, "no JSON"),
    ("}{", None, "no JSON"),
    ("\x00\ud800{", None, "no JSON"),
    ("{turn left}", None, "no JSON"),
    # no action
    ("{}", None, "no action key"),
    ('{"thoughts": "turn left"}', None, "no action key"),
    ('{"thoughts": "the action: turn left"}', None, "no action key"),
    ('{"thoughts": "\\"action\\": \\"turn left\\""}', None, "no action key"),
    ('{"reaction": "turn left", "actions": "hit"}', None, "no action key"),
    ('{"thoughts": "cut off while thin', None, "no action key"),
    ('{"thoughts": "so", "act', None, "no action key"),
    ('{"thoughts": "so", "action"', None, "no action key"),
    ('{"inner": {"action": "turn left"}}', None, "no action key"),
    ('{"thoughts": ["action", {"action": "hit"}', None, "no action key"),
    # an action that is none
    ('{"action": ""}', None, "empty action"),
    ('{"action": "  "}', None, "empty action"),
    ('{"action": null}', None, "empty action"),
    ('{"action":', None, "empty action"),
    ('{"action": "', None, "empty action"),
    ('{"action": "fly"}', None, "illegal action 'fly'"),
    ('{"action": "100"}', None, "illegal action '100'"),
    ('{"action": "1"}', None, "illegal action '1'"),
    ('{"action": 1.0e1}', None, "illegal action '1.0e1'"),
    ('{"action": "white"}', None, "illegal action 'white'"),
    ('{"action": "turn left or right"}', None, "illegal action 'turn left or right'"),
    ('{"action": "turn left, turn right"}', None, "illegal action 'turn left, turn right'"),
    ('{"action": "turnleft"}', None, "illegal action 'turnleft'"),
    ('{"action": "turn le', None, "illegal action 'turn le'"),
    ('{"action": "-10"}', None, "illegal action '-10'"),
    ('{"action": "--"}', None, "illegal action '--'"),
    ('{"action": "."}', None, "illegal action '.'"),
    ('{"action": true}', None, "illegal action 'true'"),
    ('{"action": ["turn left"]}', None, "illegal action '[\"turn left\"]'"),
    ('{"action": {"name": "hit"}}', None, 'illegal action \'{"name": "hit"}\''),
    ('{"action": "turn left", "action": "fly"}', None, "illegal action 'fly'"),
    ('{"action": "turn left" or "turn right"}', None, "illegal action 'turn left\" or \"turn right'"),
    ('{"action": "\ud800"}', None, "illegal action '\\ud800'"),
    ('{"action": "' + "x" * 50 + '"}', None, "illegal action '" + "x" * 40 + "...'"),
    ('{action: hit "me"}', None, "no action key"),
    ("{action: hit, or go}", None, "no action key"),
    # more or less than the object
    (f"```json\n{CANONICAL}\n```", "turn left", None),
    (f"I think {CANONICAL} is best. {{really}}", "turn left", None),
    (f"I will use {{the key}} now: {CANONICAL}", "turn left", None),
    (f"{{{CANONICAL}}}", "turn left", None),
    (f"[{CANONICAL}]", "turn left", None),
    ('{"thoughts": "first"} {"action": "turn left"}', "turn left", None),
    (f'{CANONICAL} {{"action": "hit"}}', "turn left", None),
    ("{action: 'hit'} " + CANONICAL, "turn left", None),  # sound JSON goes before what only resembles it
    ("{action: 'turn left'} {action: 'hit'}", "turn left", None),
    ("\ufeff" + CANONICAL, "turn left", None),
    (CANONICAL + "}", "turn left", None),
    # the last of several keys
    ('{"action": "fly", "action": "turn left"}', "turn left", None),
    ('{"action": "turn left", "Action": "hit"}', "turn left", None),
    ('{"Action": "fly", "action": "turn left"}', "turn left", None),
    # cut off, or not closed
    ('{"thoughts": "so", "action": "turn left"', "turn left", None),
    ('{"thoughts": "so", "action": "turn left', "turn left", None),
    ('{"thoughts": "so", "action": "turn left}', "turn left", None),
    ('{"thoughts": "so", "action": "turn left\\"}', "turn left", None),
    ('{"thoughts": "so", "action": "turn left"\n```', "turn left", None),
    ('{"action": "turn left", "thoughts": "cut off whi', "turn left", None),
    ('{"action": "turn left", "note": [{"a": 1', "turn left", None),
    ('{"action": "turn left", "tho', "turn left", None),
    ('{"action": "turn left", "', "turn left", None),
    ('{"action": "turn left", "turn right"}', None, "illegal action 'turn left\", \"turn right'"),
    # commas
    ('{"thoughts": "so", "action": "turn left",}', "turn left", None),
    ('{"thoughts": "so", "action": "turn left",', "turn left", None),
    ('{"thoughts": "so" "action": "turn left"}', "turn left", None),
    ('{"thoughts": "so",, "action": "turn left"}', "turn left", None),
    # quotes
    ("{'thoughts': 'so', 'action': 'turn left'}", "turn left", None),
    ("{'thoughts': 'I can't go', 'action': 'turn left'}", "turn left", None),
    ("{'thoughts': \"so\", \"action\": 'turn left'}", "turn left", None),
    ('{thoughts: "so", action: "turn left"}', "turn left", None),
    ('{"thoughts": so, "action": turn left}', "turn left", None),
    ("{thoughts: so, action: turn left", "turn left", None),
    ('{"thoughts": "the "red" key", "action": "turn left"}', "turn left", None),
    ('{"thoughts": "one\ntwo", "action": "turn left"}', "turn left", None),
    ('{"thoughts": "bad \\x escape", "action": "turn left"}', "turn left", None),
    # the action's spelling
    ('{"Action": "turn left"}', "turn left", None),
    ('{"ACTION" : "Turn_Left."}', "turn left", None),
    ('{"action": "turn-left!"}', "turn left", None),
    ('{"action": "turn\n\\u0020left"}', "turn left", None),
    ('{"action": " TURN   left\\n"}', "turn left", None),
    ('{"action": "\'turn left\'"}', "turn left", None),
    ('{"action": "\\"turn left\\"."}', "turn left", None),
    ('{"action": "“turn left”"}', "turn left", None),
    ('{"action": 10}', "10", None),
    ('{"action": "10."}', "10", None),
    ('{"action": "-"}', "-", None),
    ('{"action": " + "}', "+", None),
]


@pytest.mark.parametrize(("text", "action", "error"), MALFORMED)
def test_cot_json_reads_or_names_the_fault(text: str, action: str | None, error: str | None) -> None:
    parsed = parse("cot_json", text)
    assert (parsed.action, parsed.error) == (action, error)


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("{'thoughts': 'I can't go', 'action': 'hit'}", "I can't go", "hit"),
        ('{"thoughts": "the "red" key", "action": "hit"}', 'the "red" key', "hit"),
        ("{thoughts: so it is , action: hit }", "so it is", "hit"),
        ('{"thoughts": "so", "action": "hit}', "so", "hit"),
        ('{"thoughts": "so", "action": "fly"}', "so", "fly"),  # spans of an illegal action too
        ('{"thoughts": "so", "action": 10}', "so", "10"),
        ('{"action": "10", "thoughts": "after"}', "after", "10"),
        ('{"action": "fly", "action": "10", "thoughts": "a", "thoughts": "b"}', "b", "10"),
    ],
)
def test_spans_of_malformed_replies(text: str, thought: str, action: str) -> None:
    parsed = parse("cot_json", text)
    assert (cut(text, parsed.thought_span), cut(text, parsed.action_span)) == (thought, action)


@pytest.mark.parametrize(
    ("text", "legal", "action"),
    [
        ('{"action": "1', ("1", "10"), None),  # of 10?
        ('{"action": 1', ("1", "10"), None),
        ('{"action": "1 ', ("1", "10"), None),
        ('{"action": "1"', ("1", "10"), "1"),
        ('{"action": 1}', ("1", "10"), "1"),
        ('{"action": "10', ("1", "10"), "10"),
        ('{"action": "pick up', ("pick up", "pick_up_red"), None),
        ('{"action": "go', ("Go", "go north"), None),
        ('{"action": "go to the f', None, None),  # free text may always have gone on
        ('{"action": "go to the fridge"', None, "go to the fridge"),
    ],
)
def test_an_action_that_may_have_gone_on_is_none(text: str, legal: tuple[str, ...] | None, action: str | None) -> None:
    parsed = parse("cot_json", text, legal)
    assert parsed.action == action
    assert (parsed.error is None) == (action is not None)


def test_a_reply_cut_off_in_its_thoughts_keeps_their_span() -> None:
    parsed = parse("cot_json", '{"thoughts": "so it')
    assert parsed == Parsed(None, (14, 19), None, "no action key")


@pytest.mark.parametrize(
    ("text", "action", "error"),
    [
        ("", None, "empty reply"),
        ("  \n", None, "empty reply"),
        (" turn left \n", "turn left", None),
        ('"Turn Left."', "turn left", None),
        ("`turn_left`", "turn left", None),
        ("10", "10", None),
        ("100", None, "illegal action '100'"),
        ("-", "-", None),
        ("I turn left", None, "illegal action 'I turn left'"),
        ("turn left\nturn right", None, "illegal action 'turn left\\nturn right'"),
        (CANONICAL, None, 'illegal action \'{"thoughts": "so", "action": "turn left"...\''),
    ],
)
def test_action_only_takes_the_whole_text(text: str, action: str | None, error: str | None) -> None:
    parsed = parse("action_only", text)
    assert (parsed.action, parsed.error) == (action, error)
    assert parsed.action_span is None if error == "empty reply" else cut(text, parsed.action_span) == text.strip()


def test_free_text_is_any_action_that_is_not_empty() -> None:
    assert parse("cot_json", '{"action": " Go to the \\"fridge\\" 1. "}', None).action == 'Go to the "fridge" 1.'
    assert parse("action_only", " open it!\n", None).action == "open it!"
    assert parse("cot_json", '{"action": " "}', None).error == "empty action"
    assert parse("cot_json", '{"action": null}', None).error == "empty action"


def test_punctuation_is_an_action_only_as_it_stands() -> None:
    assert parse("action_only", '"."', (".", "hit")).error == "illegal action '\".\"'"
    assert parse("action_only", "?", (".", "hit")).error == "illegal action '?'"
    assert parse("action_only", ".", (".", "hit")).action == "."


def test_an_action_that_could_be_two_is_none() -> None:
    legal = ("go_left", "go left")
    assert parse("action_only", "go left", legal).action == "go left"
    assert parse("action_only", "Go Left", legal).error == "illegal action 'Go Left'"


# ---- replies that begin with thinking --------------------------------------------------------------------------------
DRAFT = '{"thoughts": "draft", "action": "hit"}'
# reply, action, error, and where the thought ends: in front of this
THINKING = [
    (f"<think>I could {DRAFT}, but</think>{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f"<think>\n\n</think>\n\n{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f"I could {DRAFT}, but\n</think>\n{CANONICAL}", "turn left", None, '", "action": "turn left'),  # opened before
    (f"<thinking>{DRAFT}</thinking>{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f"[THINK]{DRAFT}[/THINK]{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f"◁think▷{DRAFT}◁/think▷{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f"<think>a</think>{DRAFT}<think>b</think>{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f'<think>{{"action": "hit</think>{CANONICAL}', "turn left", None, '", "action": "turn left'),
    (f"<think>set {{1, 2</think>{CANONICAL}", "turn left", None, '", "action": "turn left'),
    (f'<think>{DRAFT}</think>{{"action": "turn left", "thoughts": "so"}}', "turn left", None, '{"action": "turn left"'),
    (f'<think>{DRAFT}</think>{{"action": "turn left"}}', "turn left", None, '{"action": "turn left"'),
    # no answer
    (f"<think>I could {DRAFT}, but", None, "no answer", None),
    (f"<think>I could {DRAFT}", None, "no answer", None),
    (f"<think>{DRAFT}</think>", None, "no answer", None),
    (f"<think>{DRAFT}</think> \n", None, "no answer", " \n"),
    (f"<think>a</think>{CANONICAL}<think>or rather", None, "no answer", None),
    (f"<think>{DRAFT}</think>I don't know", None, "no JSON", "I don't know"),
    (f'<think>{DRAFT}</think>{{"thoughts": "so"}}', None, "no action key", '"}'),
    # marks that the answer itself spells
    ('{"thoughts": "<think>a</think> b", "action": "turn left"}', "turn left", None, '", "action"'),
    ('{"thoughts": "then </think> ends it", "action": "turn left"}', "turn left", None, '", "action"'),
    ('{"thoughts": "<think> begins it", "action": "turn left"}', "turn left", None, '", "action"'),
    (f'<think>{DRAFT}</think>{{"thoughts": "</think>", "action": "turn left"}}', "turn left", None, '", "action": "tu'),
    (f'<think>{DRAFT} {{"thoughts": "</think>", "action": "hit"}}', None, "no answer", None),
]


@pytest.mark.parametrize(("text", "action", "error", "end"), THINKING)
def test_the_answer_stands_behind_the_thinking(
    text: str, action: str | None, error: str | None, end: str | None
) -> None:
    parsed = parse("cot_json", text)
    assert (parsed.action, parsed.error) == (action, error)
    assert parsed.thought_span is not None
    assert text[parsed.thought_span[1] :].startswith(end) if end else parsed.thought_span[1] == len(text)
    if text[0] != "{":  # the thinking is part of the thought
        assert parsed.thought_span[0] == 0
    if action:
        assert cut(text, parsed.action_span) == action


@pytest.mark.parametrize("name", ["cot_json", "action_only", "action_scores", "rl4vlm"])
def test_no_format_plays_a_draft(name: str) -> None:
    # At temperature 0.01 another action than the one with the highest score has probability e^-400.
    made = prompt_format(name, 0.01)
    draft, answer = made.write("a draft", "hit", LEGAL), made.write("so", "turn left", LEGAL)
    for text in (f"<think>{draft}</think>{answer}", f"{draft}\n</think>\n\n{answer}\n"):
        parsed = drawn(made.parse(text, LEGAL), np.random.default_rng(0))
        assert (parsed.action, parsed.error) == ("turn left", None)
        assert parsed.thought_span is not None
        assert parsed.action_span is not None
        assert draft in cut(text, parsed.thought_span)
        assert parsed.thought_span[1] <= parsed.action_span[0] >= text.index("</think>") + len("</think>")
    for text in (f"<think>{draft}", f"<think>{draft}</think>", f"<think>{draft}</think>\n\n"):
        parsed = drawn(made.parse(text, LEGAL), np.random.default_rng(0))
        assert (parsed.action, parsed.error) == (None, "no action key" if name == "rl4vlm" else "no answer")


# ---- scores ----------------------------------------------------------------------------------------------------------
TWO = ("hit", "stand")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty reply"),
        ("hit: 5, stand: 1", "no JSON"),
        ('{"thoughts": "so"}', "no scores key"),
        ('{"scores": {"hit": 5}}', "no score for 'stand'"),
        ('{"scores": {"hit": 5, "sta', "no score for 'stand'"),
        ('{"scores": {}}', "no score for 'hit'"),
        ('{"scores": [5, 1]}', "no score for 'hit'"),
        ('{"scores": "hit"}', "no score for 'hit'"),
        ('{"scores":', "no score for 'hit'"),
        ('{"scores": {"hit": 5, "stand": 1, "fly": 2}}', "illegal action 'fly'"),
        ('{"scores": {"hit": 5, "stand": 0}}', "bad score '0'"),
        ('{"scores": {"hit": 6, "stand": 1}}', "bad score '6'"),
        ('{"scores": {"hit": NaN, "stand": 1}}', "bad score 'NaN'"),
        ('{"scores": {"hit": 1e999, "stand": 1}}', "bad score '1e999'"),
        ('{"scores": {"hit": "high", "stand": 1}}', "bad score 'high'"),
        ('{"scores": {"hit": null, "stand": 1}}', "bad score ''"),
        ('{"scores": {"hit": [5], "stand": 1}}', "bad score '[5]'"),
    ],
)
def test_action_scores_names_the_fault(text: str, error: str) -> None:
    parsed = parse("action_scores", text, TWO)
    assert (parsed.action, parsed.error) == (None, error)


@pytest.mark.parametrize(
    "text",
    [
        '{"scores": {"hit": 1, "stand": 5}}',
        '{"scores": {"stand": 5.0, "hit": "1"}}',
        "{'scores': {'Stand': 5, 'HIT': 1,}",
        "{scores: {stand: 5, hit: 1",
        '```json\n{"Scores": {"hit": 5, "hit": 1, "stand": 5}}\n```',
    ],
)
def test_action_scores_forgives(text: str) -> None:
    # At temperature 0.01 the other action has probability e^-400.
    parsed = drawn(prompt_format("action_scores", 0.01).parse(text, TWO), np.random.default_rng(0))
    assert (parsed.action, parsed.error) == ("stand", None)
    assert cut(text, parsed.action_span).startswith("{")


def test_action_scores_without_a_list_of_legal_actions() -> None:
    text = prompt_format("action_scores").write("so", "open it", None)
    assert text == '{"thoughts": "so", "scores": {"open it": 5}}'
    assert parse("action_scores", text, None).action == "open it"
    assert parse("action_scores", '{"scores": {}}', None).error == "no scores"


def test_scores_are_drawn_by_softmax() -> None:
    # Scores 5, 1, 1 at temperature 0.5 are logits 10, 2, 2: p = e^10 / (e^10 + 2 e^2) = 0.99933, too near 1 to
    # tell much, so also at temperature 4: logits 1.25, 0.25, 0.25, p = e / (e + 2) = 0.57612.
    text = '{"scores": {"c": 1, "a": 5, "b": 1}}'
    for temperature, chance in ((0.5, math.exp(10) / (math.exp(10) + 2 * math.exp(2))), (4.0, math.e / (math.e + 2))):
        rng = np.random.default_rng(7)
        draws = 4000
        prompts = prompt_format("action_scores", temperature)
        actions = [drawn(prompts.parse(text, ("a", "b", "c")), rng).action for _ in range(draws)]
        for action, p in (("a", chance), ("b", (1 - chance) / 2), ("c", (1 - chance) / 2)):
            deviation = math.sqrt(p * (1 - p) / draws)
            assert abs(actions.count(action) / draws - p) < 4 * deviation


def test_the_draw_depends_on_scores_and_generator_only() -> None:
    legal = ("a", "b", "c")
    texts = ('{"scores": {"a": 3, "b": 3, "c": 3}}', "{'scores': {'C': 3, 'B': 3, 'A': 3}}")
    first, second = ([parse("action_scores", text, legal, seed).action for seed in range(50)] for text in texts)
    assert first == second
    assert set(first) == set(legal)


def test_only_a_draw_moves_the_generator() -> None:
    for name, text in (("cot_json", CANONICAL), ("action_only", "hit"), ("action_scores", '{"scores": {"hit": 9}}')):
        rng = np.random.default_rng(3)
        drawn(prompt_format(name).parse(text, LEGAL), rng)
        assert rng.random() == np.random.default_rng(3).random()


def test_what_a_format_of_ones_own_raises_later_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The few replies that it is tried on when it loads can't show everything."""
    (tmp_path / "frail.py").write_text(
        "from vlm_agents.prompting.action_only import ActionOnly\n\n\n"
        "class Frail(ActionOnly):\n"
        "    def parse(self, text, legal_actions):\n"
        "        return super().parse(text, legal_actions) if text != 'odd' else {}['odd']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    frail = make_format(PromptConfig("custom", factory="frail:Frail"))
    assert frail.parse(frail.write("", "left", ("left",)), ("left",)).action == "left"
    with pytest.raises(ConfigError, match=r"^prompt\.factory=frail:Frail: KeyError: 'odd' \(.*frail\.py, line 6\)$"):
        frail.parse("odd", ("left",))
