"""Replies to the card games: whole words only for our formats, the original's substring search for `rl4vlm`."""

import json
import string
from collections import Counter

import numpy as np
import pytest

from vlm_agents.config import PromptConfig
from vlm_agents.prompting import make_format
from vlm_agents.types import Observation

NUMBERS = tuple(map(str, range(1, 11)))
GAMES = {
    "number_line": ("-", "+"),
    "blackjack": ("stand", "hit"),
    "ezpoints": (*NUMBERS, "+", "*", "="),
    "points24": (*NUMBERS, "+", "-", "*", "/", "(", ")", "="),
}
COT, THEIRS = (make_format(PromptConfig(name)) for name in ("cot_json", "rl4vlm"))
RNG = np.random.default_rng(0)  # neither format draws

# ---- cot_json --------------------------------------------------------------------------------------------------------
WORDS = """
100 11 12 01 1.0 0 110 1,0 ten -1 +1 1+ -- +- == () [ ** // *10* (5) <= 1e1
white which hits hitting understand standing stan hi null None action
"""
# - - + x : / = and, in other digits and letters, 1 1 3 1 hit
FOREIGN = "\u2212 \u2013 \uff0b \xd7 \xf7 \u2044 \uff1d 1\ufe0f\u20e3 \uff11 \u0663 \xb9 \uff28\uff29\uff34"
LURES = (
    *WORDS.split(),
    *FOREIGN.split(),
    *("10 10", "1 0", "3 + 4", "stand or hit", "hit, stand", "h i t", "", " "),
    *("\x00hit", "hit\x00", "hit\u200b", "h\u00adit", "\u017ftand", "\ufb06and"),
)
THOUGHTS = (
    "the cards are 10 and 2, so I hit",
    '"action": "10", or "action": "stand"',
    '{"action": "hit"}',
    "white understands 100 / 10 = 10",
    "größe \U0001f0a1 \ud83d",
    "",
)
QUOTES = " \"'`"
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " "


def random_value(rng: np.random.Generator, legal: tuple[str, ...]) -> str:
    """A legal word, a lure, or a word with something before or behind it."""
    word = legal[rng.integers(len(legal))]
    other = (*legal, *LURES)[rng.integers(len(legal) + len(LURES))]
    extra = "".join(rng.choice(list(PRINTABLE)) for _ in range(rng.integers(1, 3)))
    return (word, word.upper(), other, other, extra + word, word + extra, word + other, f" {word}.")[rng.integers(8)]


def meant(value: str, legal: tuple[str, ...]) -> str | None:
    """What a strict reader grants: the whole value is the word, but for case, quotes, spaces and a final stop."""
    if value.strip() in legal:
        return value.strip()
    core = value.lstrip(QUOTES).rstrip(QUOTES + ".,;:!?").lower()
    return core if core in legal else None


def test_ten_thousand_actions_are_read_whole_or_not_at_all() -> None:
    rng = np.random.default_rng(30)
    outcomes = Counter()
    for index in range(10_000):
        game, legal = list(GAMES.items())[index % 4]
        value = random_value(rng, legal)
        fields = [("thoughts", THOUGHTS[rng.integers(len(THOUGHTS))]), ("action", value)]
        if rng.random() < 0.3:
            fields.reverse()
        text = json.dumps(dict(fields), ensure_ascii=bool(rng.integers(2)))
        text = (text, f"```json\n{text}\n```", f"I say {text}, 10 or hit.", text[:-1])[rng.integers(4)]
        parsed = COT.parse(text, legal)
        assert parsed.action == meant(value, legal), (game, text)
        assert (parsed.error is None) == (parsed.action is not None)
        outcomes[game, parsed.action is None] += 1
    assert len(outcomes) == 8
    assert min(outcomes.values()) > 400


@pytest.mark.parametrize("name", ["cot_json", "action_only", "rl4vlm"])
def test_ten_thousand_broken_replies_raise_nothing(name: str) -> None:
    rng, prompt_format = np.random.default_rng(31), make_format(PromptConfig(name))
    pieces = (
        *('{"thoughts": "', '{"thoughts": "so", "action": "', '"action":', '"action": "', '"}', "{", "}", '"', "\\"),
        *("10", "100", "hit", "white", "+", "="),
    )
    read = 0
    for index in range(10_000):
        legal = list(GAMES.values())[index % 4]
        if index % 3:
            text = "".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(0, 14)))
        else:
            text = "".join(map(chr, rng.integers(0, 0x11_0000, size=rng.integers(0, 40))))
        parsed = prompt_format.parse(text, legal)
        assert (parsed.action is None) != (parsed.error is None), repr(text)
        for start, end in filter(None, (parsed.thought_span, parsed.action_span)):
            assert 0 <= start <= end <= len(text)
        if parsed.action is not None:
            read += 1
            assert parsed.action in legal
            assert parsed.action in text.lower(), repr(text)
            if name != "rl4vlm":
                assert parsed.action_span is not None
                assert meant(text[slice(*parsed.action_span)], legal) == parsed.action, repr(text)
    assert read > 20


@pytest.mark.parametrize("legal", GAMES.values(), ids=GAMES)
@pytest.mark.parametrize("prompt_format", [COT, THEIRS], ids=["cot_json", "rl4vlm"])
def test_every_action_survives_a_round_trip(prompt_format, legal: tuple[str, ...]) -> None:
    for word in legal:
        text = prompt_format.write("so it is", word, legal)
        parsed = prompt_format.parse(text, legal)
        assert (parsed.action, parsed.error) == (word, None)
        assert parsed.thought_span is not None
        assert "so it is" in text[slice(*parsed.thought_span)]
        assert parsed.action_span is not None
        assert word in text[slice(*parsed.action_span)]


# ---- rl4vlm ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("game", "text", "action", "error"),
    [
        ("blackjack", '{"thoughts": "so", "action": "hit"}', "hit", None),
        ("blackjack", '{"Action": "HIT"}', "hit", None),
        ("blackjack", '"action": a white card', "hit", None),
        ("blackjack", '"action": I understand', "stand", None),
        ("blackjack", '"action": "hit"} rather than stand', None, "several actions"),
        ("blackjack", '"action": "hit", "action": "hit"', "hit", None),
        ("blackjack", '"action": "stand", "action": "hit"', None, "several actions"),  # the first key counts
        ("blackjack", 'hit, "action": "fold"', None, "no legal action"),
        ("blackjack", '{"action" : "hit"}', None, "no action key"),
        ("blackjack", "hit", None, "no action key"),
        ("blackjack", "", None, "no action key"),
        ("number_line", "I go +", "+", None),  # without the key the last letter is searched
        ("number_line", "+ it is", None, "no action key"),
        ("number_line", '"action": "+"}', "+", None),
        ("number_line", '"action": "+"} to-day', None, "several actions"),
        ("ezpoints", '"action": "10"', "10", None),
        ("ezpoints", '"action": "100"', "10", None),
        ("ezpoints", '"action": "11"', "1", None),
        ("ezpoints", '"action": "1010"', "10", None),
        ("ezpoints", '"action": "101"', None, "several actions"),
        ("ezpoints", '"action": "12"', None, "several actions"),
        ("ezpoints", '"action": "-"', None, "no legal action"),
        ("ezpoints", "I take 7", "7", None),
        ("points24", '"action": "("', "(", None),
        ("points24", '"action": "="', "=", None),
        ("points24", '"action": "5 + 7"', None, "several actions"),
    ],
)
def test_the_original_s_search(game: str, text: str, action: str | None, error: str | None) -> None:
    parsed = THEIRS.parse(text, GAMES[game])
    assert (parsed.action, parsed.error) == (action, error)


def test_an_action_within_another_is_not_meant() -> None:
    """ALFWorld's kitchens have twenty cabinets."""
    words = ("go to cabinet 1", "go to cabinet 10")
    assert [THEIRS.parse(f'{{"action": "{word}"}}', words).action for word in words] == list(words)
    assert THEIRS.parse('"action": "go to cabinet 10, then go to cabinet 1"', words).error == "several actions"


def test_the_key_parts_thoughts_from_action() -> None:
    parsed = THEIRS.parse('{"thoughts": "so", "action": "hit"}', GAMES["blackjack"])
    assert (parsed.thought_span, parsed.action_span) == ((0, 19), (19, 35))


@pytest.mark.parametrize(
    ("game", "keys"),
    [
        ("number_line", ("current number", "target number", "thoughts", "action")),
        ("blackjack", ("thoughts", "action")),
        ("ezpoints", ("cards", "current formula", "thoughts", "action")),
        ("points24", ("cards", "current formula", "thoughts", "action")),
    ],
)
def test_each_game_asks_for_its_keys(game: str, keys: tuple[str, ...]) -> None:
    system = THEIRS.prompt("The game.", (), Observation("", (), GAMES[game]))[0].text
    head, rule = system.split("\n")
    assert head == "The game."
    places = [rule.index(f'"{key}": ') for key in keys]
    assert places == sorted(places)
    assert rule.count('": ') == len(keys)


@pytest.mark.parametrize(
    ("said", "action"),
    [("go to drawer 1", "go to drawer 1"), ("go to drawer 10", None), ("Go to drawer 1!", "go to drawer 1")],
)
def test_an_action_of_several_words_is_found_as_words(said: str, action: str | None) -> None:
    """Where one stands one can't go, so that `go to drawer 10` isn't legal at drawer 10: it is no `go to drawer 1`."""
    assert THEIRS.parse(f'{{"action": "{said}"}}', ("go to drawer 1", "go to desk 1")).action == action
