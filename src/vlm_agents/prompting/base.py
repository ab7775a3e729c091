"""What the prompt formats share: the chat around an observation, a forgiving JSON scanner, and action matching.

Not a base class: a format is any class with the methods of `PromptFormat`, made of these functions.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from vlm_agents.config import PromptConfig
from vlm_agents.types import Message, Observation, Parsed, Prompt, Span, Turn

LegalActions = tuple[str, ...] | None


class PromptFormat(Protocol):
    """How an observation becomes a prompt, a reply an action, and an expert's advice a reply."""

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt: ...

    def parse(self, text: str, legal_actions: LegalActions, rng: np.random.Generator) -> Parsed:
        """Read a reply. Never raises and never guesses: what holds no legal action has `error` set.

        Errors begin with words that can be counted: empty reply, no JSON, no <key> key, empty action, illegal action,
        cut off after, no scores, no score for, bad score. Spans are set wherever the reply has the part, even beside an
        error.
        """
        ...

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        """The canonical reply that says this."""
        ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """A format whose prompts go through `fit`, which cuts them to what a model takes."""

    format: PromptFormat
    fit: Callable[[Prompt], Prompt]

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return self.fit(self.format.prompt(instructions, history, now))

    def parse(self, text: str, legal_actions: LegalActions, rng: np.random.Generator) -> Parsed:
        return self.format.parse(text, legal_actions, rng)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        return self.format.write(thought, action, legal_actions)


# ---- prompts ---------------------------------------------------------------------------------------------------------
def chat(system: str, history: Sequence[Turn], now: Observation, cfg: PromptConfig) -> Prompt:
    """System message, the past as `cfg.history` wants it, and what is seen now."""
    messages = [Message("system", system)]
    text = now.text
    if cfg.history == "full":
        for turn in history:
            messages.append(Message("user", turn.observation.text, turn.observation.images))
            messages.append(Message("assistant", turn.reply.text, token_ids=turn.reply.token_ids or None))
    elif cfg.history == "last_k" and history:
        text = "\n".join(filter(None, (text, past_line(history[-cfg.last_k :]))))
    return (*messages, Message("user", text, now.images))


def past_line(turns: Sequence[Turn]) -> str:
    """`Before: turn left; go forward, no effect; invalid`, oldest first."""
    return "Before: " + "; ".join(map(outcome, turns))


def outcome(turn: Turn) -> str:
    if turn.parsed.action is None:
        return "invalid"
    return turn.parsed.action + (", no effect" if turn.step.metrics["changed"] == 0 else "")


# ---- the scanner -----------------------------------------------------------------------------------------------------
# It reads every JSON object as JSON does, and also what models make of JSON: single quotes, bare keys and values,
# unescaped quotes, missing or spare commas, a missing end. One rule does most of that: a value ends only where its
# object could end or go on (CLOSE). Possessive quantifiers keep it linear in time, whatever the text; on single
# characters alone, as before Python 3.11.5 those on groups may end too far on (python/cpython#100061).
INSIDE = {quote: rf"[^{quote}\\]*+ (?: \\. [^{quote}\\]*+ )*" for quote in "\"'"}  # of a quoted string
QUOTED = f""" "{INSIDE['"']}" | '{INSIDE["'"]}' """
BARE = r"[\w\ -]++"
CLOSE = rf"""(?: [\s,]*+ (?: \}} | \Z | (?:{QUOTED}) \s*+ : )
              | \s*+ , [\s,]*+ (?: {BARE} \s*+ : | ["'][\w\ -]*+ \Z ) )"""


def pattern(source: str) -> re.Pattern[str]:
    return re.compile(source, re.VERBOSE | re.DOTALL)


KEY = pattern(rf"[\s,]*+ (?P<key> {QUOTED} | {BARE}) \s*+ : \s*+")
END = pattern(r"[\s,]*+ \}")
VALUE_END = pattern(CLOSE)
# up to a quote that closes it: any other is a character of the string, as is whatever stands behind a backslash
STRING = {quote: pattern(rf"[^{quote}\\]*+ (?: (?!{quote}{CLOSE}) \\?+ . [^{quote}\\]*+ )*") for quote in "\"'"}
BRACKET = pattern(rf""" "{INSIDE['"']} "?+ | [\[\]{{}}] """)
SCALAR = pattern(r'[^,"\[\]{}]*+')
DEBRIS = "\"'`}\\ \t\r\n"  # may stand behind a value that the reply's end cuts off


class Field(NamedTuple):
    """One `key: value` of an object. `span` is where the value stands in the text, without quotes.

    `value` is what a string says, "" for null, and any other value's raw text.
    """

    key: str
    value: str
    span: Span


def read_object(text: str, start: int) -> tuple[list[Field], int]:
    """The top-level fields of the object whose brace is at `start`, none without one, and the position behind it."""
    fields: list[Field] = []
    if not text.startswith("{", start):
        return fields, start
    end = start + 1
    while key := KEY.match(text, end):
        value, span, end = read_value(text, key.end())
        if not VALUE_END.match(text, end):
            break
        name = key["key"].strip()
        fields.append(Field(unescape(name[1:-1]) if name[0] in STRING else name, value, span))
    return fields, skip(END, text, end)


def read_value(text: str, start: int) -> tuple[str, Span, int]:
    """The value at `start`, its span, and the position behind it."""
    first = text[start : start + 1]
    if first in STRING:
        stop = behind = skip(STRING[first], text, start + 1)
        if text.startswith(first, stop):
            behind += 1
        else:  # the reply ends before the string does
            stop, behind = max(start + 1, len(text.rstrip(DEBRIS))), len(text)
        return unescape(text[start + 1 : stop]), (start + 1, stop), behind
    if first in ("{", "["):
        stop = behind_brackets(text, start)
        return text[start:stop], (start, stop), stop
    behind = skip(SCALAR, text, start)
    raw = text[start:behind].rstrip(DEBRIS)
    return "" if raw == "null" else raw, (start, start + len(raw)), behind


def skip(what: re.Pattern[str], text: str, start: int) -> int:
    """The position behind `what` at `start`; `start` where it isn't there."""
    match = what.match(text, start)
    return match.end() if match else start


def behind_brackets(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`, or the text's end."""
    depth = 0
    for token in BRACKET.finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def unescape(raw: str) -> str:
    """What a string's raw text says; the raw text itself where that is not JSON."""
    try:
        return json.loads(f'"{raw}"', strict=False)
    except ValueError:
        return raw


# ---- replies ---------------------------------------------------------------------------------------------------------
class Found(NamedTuple):
    """What a JSON reply holds: the answer's field, or an error."""

    answer: Field | None
    thought_span: Span | None
    error: str | None = None


def find_object(text: str, key: str) -> Found:
    """The field `key` and the thoughts of the first object in `text` that has `key`, sound JSON before the rest."""
    if not text.strip():
        return Found(None, None, "empty reply")
    objects = list(objects_in(text))
    if not objects:
        return Found(None, None, "no JSON")
    holders = [found for found in objects if key in found[0]]
    fields, _ = next((found for found in holders if is_json(found[1])), (holders or objects)[0])
    thoughts = fields.get("thoughts")
    return Found(fields.get(key), thoughts and thoughts.span, None if holders else f"no {key} key")


def objects_in(text: str) -> Iterator[tuple[dict[str, Field], str]]:
    """Each object: its fields by key, in whatever case, the last one of a key; and its text."""
    start = text.find("{")
    while start >= 0:
        fields, end = read_object(text, start)
        if end > start + 1:  # else a brace that begins nothing
            # A key as it is written goes before the same one in another case.
            yield {f.key.casefold(): f for f in fields} | {f.key: f for f in fields}, text[start:end]
        start = text.find("{", end)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


QUOTES = " \"'`\u201c\u201d\u2018\u2019"
JOINT = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")


def match_action(value: str, legal_actions: LegalActions) -> tuple[str | None, str | None]:
    """The legal action that `value` as a whole names, and None; or None and the error."""
    value = value.strip()
    if not value:
        return None, "empty action"
    if legal_actions is None or value in legal_actions:
        return value, None
    plain = plain_action(value)
    matches = [action for action in legal_actions if plain_action(action) == plain]
    if len(matches) == 1:
        return matches[0], None
    return None, f"illegal action {quoted(value)}"


def cut_off(text: str, action: str, span: Span, legal_actions: LegalActions) -> bool:
    """Does `text` end with `action`, at `span`, so that it may be the beginning of another one?"""
    begun = plain_action(action)
    longer = legal_actions is None or any(
        other != action and plain_action(other).startswith(begun) for other in legal_actions
    )
    return longer and not text[span[1] :].strip()


def plain_action(action: str) -> str:
    """Without quotes, final punctuation, case, and what joins words: `"Turn_left".` is `turn left`."""
    bare = action.lstrip(QUOTES).rstrip(QUOTES + ".,;:!?") or action
    return JOINT.sub(" ", bare).lower()  # casefold would turn a long s into s, and one word into another


def quoted(value: str) -> str:
    """`value` for an error: short, and printable whatever it holds."""
    return repr(value if len(value) <= 40 else value[:40] + "...")
