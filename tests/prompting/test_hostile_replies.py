"""Replies that nobody thought of: mutated, random, nested, huge. Nothing raises, nothing is read that isn't there."""

import json
import re
import time
from collections import Counter
from typing import Any

import adversarial_replies
import numpy as np
import pytest

from vlm_agents.config import PromptConfig
from vlm_agents.prompting import drawn, make_format, objects
from vlm_agents.prompting.base import find_object
from vlm_agents.prompting.objects import read_object

LEGAL = ("turn left", "turn right", "go forward", "pick up", "hit", "stand", "1", "10", "+", "-")
NAMES = ("cot_json", "action_only", "action_scores")
FORMATS = {name: make_format(PromptConfig(format=name)) for name in NAMES}
THOUGHTS = ("agent (1,2) facing right", 'the "red" key', "größe 日本 \U0001f511", "", 'a\nb\\ {"action": "hit"}')
PIECES = (
    *"{}[]\"'\\:, \n\t`\x00é日\ud83d\ude00",
    '"action":',
    "action",
    '"scores": {',
    "turn left",
    "10",
    "```json",
    "\\u00",
)


def letters(text: str) -> str:
    """The letters, digits and signs of an action, of which no tolerance may add or drop one."""
    return "".join(c for c in text.casefold() if c.isalnum() or c in "+-")


def mutated(text: str, rng: np.random.Generator) -> str:
    """`text` after up to two cuts, insertions, deletions or doublings."""
    for _ in range(rng.integers(0, 3)):
        start, end = sorted(rng.integers(0, len(text) + 1, size=2))
        end = min(end, start + int(rng.integers(1, 12)))
        piece = PIECES[rng.integers(len(PIECES))]
        text = (
            text[:start] + piece + text[start:],
            text[:start] + text[end:],
            text[:start] + piece + text[end:],
            text[:end] + text[start:],
            text[: len(text) - end + start],
        )[rng.integers(5)]
    return text


def hostile_reply(name: str, rng: np.random.Generator) -> str:
    kind = rng.integers(10)
    if kind == 0:  # any code points, lone surrogates among them
        return "".join(map(chr, rng.integers(0, 0x11_0000, size=rng.integers(0, 60))))
    if kind <= 2:  # the grammar's own pieces in any order
        return "".join(PIECES[index] for index in rng.integers(0, len(PIECES), size=rng.integers(0, 40)))
    thought, action = THOUGHTS[rng.integers(len(THOUGHTS))], LEGAL[rng.integers(len(LEGAL))]
    text = FORMATS[name].write(thought, action, LEGAL)
    if kind == 3:  # nested
        depth = int(rng.integers(1, 200))
        text = '{"a":[' * depth + text + "]}" * int(rng.integers(0, depth))
    return mutated(text, rng)


def test_ten_thousand_hostile_replies() -> None:
    rng = np.random.default_rng(20)
    read, began = 0, time.process_time()
    for index in range(10_000):
        name = NAMES[index % 3]
        text = hostile_reply(name, rng)
        parsed = drawn(FORMATS[name].parse(text, LEGAL), rng)
        assert (parsed.action is None) != (parsed.error is None), repr(text)
        for start, end in filter(None, (parsed.thought_span, parsed.action_span)):
            assert 0 <= start <= end <= len(text), repr(text)
        if parsed.action is None:
            continue
        read += 1
        assert parsed.action in LEGAL
        assert parsed.action_span is not None
        source = text[slice(*parsed.action_span)]
        if name == "action_scores":
            assert letters(parsed.action) in letters(source), repr(text)
        else:
            assert letters(source) == letters(parsed.action), repr(text)
        if parsed.thought_span is not None:
            first, second = sorted((parsed.thought_span, parsed.action_span))
            assert first[1] < second[0], repr(text)
    assert time.process_time() - began < 5
    assert 1000 < read < 9000  # both outcomes are well represented


def test_the_benchmark_s_replies_are_read_for_what_they_name() -> None:
    """The first thousand of benchmarks/adversarial_replies.py, through each format."""
    outcomes: Counter[tuple[str, str, bool]] = Counter()
    assert list(adversarial_replies.faults(1000, 0, outcomes)) == []
    for name in adversarial_replies.NAMES:
        assert outcomes[name, "sound", True] > 50
        assert outcomes[name, "unfinished", False] > 50
        assert outcomes[name, "behind thinking", True] > 50


def random_json(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = rng.integers(8 if depth < 3 else 5)
    if kind <= 1:
        return "".join(PIECES[index] for index in rng.integers(0, len(PIECES), size=rng.integers(0, 8)))
    if kind <= 4:
        return (None, True, float(rng.normal()))[kind - 2]
    values = [random_json(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    if kind == 5:
        return values
    return {random_json(rng, 9) if rng.random() < 0.3 else f"k{index}": value for index, value in enumerate(values)}


def test_sound_json_is_read_as_json_reads_it() -> None:
    rng = np.random.default_rng(21)
    layouts: tuple[dict[str, Any], ...] = ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False})
    for _ in range(3000):
        text = json.dumps(
            {str(index): random_json(rng) for index in range(3)} | {"": random_json(rng)}, **layouts[rng.integers(4)]
        )
        fields, end = read_object(text + "}", 0)
        assert end == len(text)
        wanted = json.loads(text, object_pairs_hook=list)
        assert [field.key for field in fields] == [key for key, _ in wanted]
        for field, (_, value) in zip(fields, wanted, strict=True):
            raw = text[slice(*field.span)]
            if isinstance(value, str):
                assert field.value == value
                assert json.loads(f'"{raw}"') == value
            elif value is None:
                assert (field.value, raw) == ("", "null")
            else:
                assert field.value == raw
                assert json.loads(raw, object_pairs_hook=list) == value


@pytest.mark.parametrize("unit", adversarial_replies.UNITS)
@pytest.mark.parametrize("head", ["", '{"thoughts": "', "{'thoughts': '", '{"action": ', '{"action": "hit", "x": ['])
def test_a_hundred_kilobytes_take_linear_time(head: str, unit: str) -> None:
    text = head + unit * (100_000 // len(unit))
    began = time.process_time()
    find_object(text, "action")
    for name in NAMES:
        FORMATS[name].parse(text, LEGAL)
    # About 0.05 s; quadratic time would be minutes.
    assert time.process_time() - began < 2


def test_no_group_is_repeated_possessively() -> None:
    """Before Python 3.11.5 such a group may end too far on, which no test on a newer one would show."""
    patterns = [item for item in vars(objects).values() if isinstance(item, re.Pattern)] + list(objects.STRING.values())
    assert len(patterns) > 5
    assert not [found.pattern for found in patterns if re.search(r"\)(?:[*+?]|\{[\d,]+\})\+", found.pattern)]
