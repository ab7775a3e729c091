"""A forgiving JSON scanner: the objects in a reply, read as JSON reads them, and as models write them.

It knows nothing of actions, formats or thinking.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from vlm_agents.types import Span

# Every JSON object is read as JSON does, and so is what models make of JSON: single quotes, bare keys and values,
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


def objects_in(text: str, start: int = 0) -> Iterator[tuple[dict[str, Field], Span]]:
    """Each object from `start` on: its fields by key, in whatever case, the last one of a key; and where it stands."""
    start = text.find("{", start)
    while start >= 0:
        fields, end = read_object(text, start)
        if end > start + 1:  # else a brace that begins nothing
            # A key as it is written goes before the same one in another case.
            yield {f.key.casefold(): f for f in fields} | {f.key: f for f in fields}, (start, end)
        start = text.find("{", end)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
