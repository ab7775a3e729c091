"""Do replies that nobody meant break the prompt formats, or get an action read that they don't name?

Replies are drawn from a seed, `--count` for each format: sound ones and cut-off ones, thinking with drafts of other
actions, nested objects and tool calls, look-alike letters, huge numbers, control characters, halves of surrogate pairs.
What drew a reply knows which action it names, so the readings are checked against that, not against the parser. Then
each hostile pattern is read at 25, 100 and 400 kB. tests/prompting runs the first part with fewer replies.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from vlm_agents.config import PromptConfig
from vlm_agents.prompting import PromptFormat, make_format
from vlm_agents.prompting import drawn as chosen
from vlm_agents.types import Parsed

LEGAL = ("turn left", "turn right", "go forward", "pick up", "hit", "stand", "1", "10", "+", "-")
NAMES = ("cot_json", "action_only", "action_scores", "rl4vlm")
# At temperature 0.01 an action that is scored 1 beside one with 5 has probability e^-400.
FORMATS = {name: make_format(PromptConfig(format=name, score_temperature=0.01)) for name in NAMES}
BY_LOOKS = "rl4vlm"  # finds words anywhere behind its key, as the original does

THOUGHTS = (
    "",
    "agent (1,2) facing right; go to the key",
    'the "red" key, it\'s {here}, [there]: a\\b',
    'then "action": "hit" or {"action": "stand"}',
    "größe 日本 \U0001f511 \u202eთ\u200f\u2066 e\u0301",
    "bell \x07, escape \x1b[2J, null \x00, delete \x7f, next line \x85",
    "half a pair \ud83d, the other \udd11",
    "<think>not thinking</think> [/THINK] ◁/think▷",
    "9" * 5000,
    "no end\\",
)
DRAFTS = ("so ", "set {1, 2 ", 'a quote " ', "```json\n", "[", "日本 ")
THINK = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
# none of these is an action, whatever it looks like
STRANGE = (
    *("turnleft", "turn left right", "turn left or turn right", "hit, stand", "hit/stand", "white", "understand"),
    *("100", "11", "1 0", "10 10", "1.0", "10.0", "01", "1e1", "0x1", "-1", "+1", "--", "+-", "1_0", "9" * 4000),
    *(
        "links",
        "nach links drehen",
        "tourner à gauche",
        "左转",
        "налево",
        "hit\u200b",
        "\u202ehit",
        "h\u0131t",
        "hit\x00",
    ),
    *("\u017ftand", "\ufb06and", "\uff28\uff29\uff34", "p\u0456ck up", "go f\u043erward", "\u0660", "\uff11", "\xb9"),
    *("\u2212", "\uff0b", "\u2795", "1\ufe0f\u20e3", "h\u0130t", "hit\u0301", "null", "true", "[]", "\ud83d", ""),
)
NO_SCORES = ("", "0", "6", "-1", "5.1", "nan", "inf", "1e999", "9" * 4000, "high", "[5]", "5/5", "\ud83d")
PIECES = (
    *"{}[]\"'\\:, \n\t`\x00\x1b\x85\u2028\u202eé日\ud83d\ude00",
    *('"action":', "action", '"scores": {', "turn left", "10", "```json", "\\u00", "\\ud83d", "1e999"),
    *("<think>", "</think>", "[/THINK]", "<tool_call>", "</tool_call>", "<|im_end|>", '{"action": "hit"}'),
)


@dataclass(frozen=True)
class Drawn:
    """A reply and the only action that may be read in it. `must`: and that has to be. None: no action may be read.

    Where not even its author knows, `known` is false: then an action has to stand there letter by letter.
    """

    kind: str
    text: str
    action: str | None = None
    must: bool = False
    known: bool = True


def pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def draw(name: str, rng: np.random.Generator) -> Drawn:
    """One reply for the format `name`."""
    kinds = (sound, spelled, in_prose, behind_thinking, unfinished, cut, inner, strange, prose, damaged, debris)
    return kinds[rng.integers(len(kinds))](name, rng)


def canonical(name: str, rng: np.random.Generator, action: str) -> str:
    return FORMATS[name].write(pick(THOUGHTS, rng), action, LEGAL)


def sound(name: str, rng: np.random.Generator) -> Drawn:
    action = pick(LEGAL, rng)
    text = canonical(name, rng, action)
    if name != "action_only":
        layouts: tuple[dict[str, Any], ...] = ({"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}, {})
        text = json.dumps(json.loads(text), **layouts[rng.integers(4)])
        text = (text, f"```json\n{text}\n```", f"\ufeff{text}", f"\n\n{text} \t")[rng.integers(4)]
    return Drawn("sound", text, action, must=True)


def spelled(name: str, rng: np.random.Generator) -> Drawn:
    """In another case, quoted, with a final stop, joined by an underscore; the key twice."""
    action = pick(LEGAL, rng)
    said = (action.upper(), f"'{action}'", f" {action}.", action.replace(" ", "_"), action.title())[rng.integers(5)]
    if name == "action_only":
        return Drawn("spelled", said, action, must=True)
    if name == "cot_json":
        twice = ('"action": "fly", ', '"ACTION": "stand", ', '"action": null, ', "")[rng.integers(4)]
        return Drawn("spelled", f'{{{twice}"thoughts": "so", "action": {json.dumps(said)}}}', action, must=True)
    if name == "action_scores":
        rest = ", ".join(f"{json.dumps(word)}: {1 + (word == action) * 4}" for word in LEGAL)
        return Drawn("spelled", f"{{'thoughts': so, SCORES: {{{rest},}}", action, must=True)
    return Drawn("spelled", f'{{"ACTION": "{action}"}}', action, must=True)


def in_prose(name: str, rng: np.random.Generator) -> Drawn:
    """Between words that name other actions."""
    action, other = pick(LEGAL, rng), pick(LEGAL, rng)
    text = f"I could {other}, or even stand. {canonical(name, rng, action)} beats hit and {other}"
    if name == "action_only":
        return Drawn("in prose", text)
    return Drawn("in prose", text, action, must=name != BY_LOOKS, known=name != BY_LOOKS)


def thinking(name: str, rng: np.random.Generator) -> tuple[str, str]:
    """Thoughts with drafts of other actions, up to the mark that closes them, and that mark."""
    begin, end = THINK[rng.integers(4)]
    drafts = [pick(DRAFTS, rng) + canonical(name, rng, pick(LEGAL, rng)) for _ in range(rng.integers(1, 4))]
    return (begin, "", f"{begin}a{end} b{begin}")[rng.integers(3)] + "\n".join(drafts), end


def behind_thinking(name: str, rng: np.random.Generator) -> Drawn:
    action = pick(LEGAL, rng)
    before, end = thinking(name, rng)
    return Drawn("behind thinking", f"{before}{end}\n{canonical(name, rng, action)}", action, must=True)


def unfinished(name: str, rng: np.random.Generator) -> Drawn:
    """Thinking with drafts and no answer behind it."""
    before, end = thinking(name, rng)
    begin = THINK[rng.integers(4)][0]
    return Drawn("unfinished", begin + before if rng.random() < 0.5 else f"{before}{end}{pick(('', ' ', 'Hm.'), rng)}")


def cut(name: str, rng: np.random.Generator) -> Drawn:
    """Cut off anywhere. A bare `1` may be all of an answer or the beginning of `10`: known to nobody."""
    action = pick(LEGAL, rng)
    text = canonical(name, rng, action)
    known = name in ("cot_json", "action_scores")
    return Drawn("cut", text[: rng.integers(len(text) + 1)], action, known=known)


def inner(name: str, rng: np.random.Generator) -> Drawn:
    """An answer inside another object: a nested one, a tool call's arguments, an example in a text."""
    text = canonical(name, rng, pick(LEGAL, rng))
    depth = int(rng.integers(1, 1500))
    wrapped = (
        '{"a":[' * depth + text + "]}" * int(rng.integers(0, depth + 1)),
        f'<tool_call>\n{{"name": "act", "arguments": {text}}}\n</tool_call>',
        json.dumps({"tool_calls": [{"function": {"name": "act", "arguments": text}}]}),
        f'{{"answer": {text}}}',
    )[rng.integers(4)]
    return Drawn("inner", wrapped, known=name != BY_LOOKS)


def strange(name: str, rng: np.random.Generator) -> Drawn:
    """What only looks like an action."""
    word = pick(STRANGE, rng)
    if name == "action_only":
        return Drawn("strange", word)
    if name == "action_scores":
        wrong = ({"hit": 5, word: 1}, {**dict.fromkeys(LEGAL, 1), "hit": pick(NO_SCORES, rng)})[rng.integers(2)]
        return Drawn("strange", json.dumps({"thoughts": "so", "scores": wrong}, ensure_ascii=False))
    bare = f'{{"thoughts": "so", "action": {word}}}' if word.isascii() and word.isdigit() else ""
    return Drawn("strange", bare or FORMATS[name].write("so", word, LEGAL), known=name != BY_LOOKS)


def prose(name: str, rng: np.random.Generator) -> Drawn:
    """Actions in running text, and no object."""
    words = " ".join(pick((*LEGAL, *STRANGE, "I", "will", "action:", '"scores"', "then"), rng) for _ in range(12))
    return Drawn("prose", f"I say: {words}", known=name != BY_LOOKS)


def damaged(name: str, rng: np.random.Generator) -> Drawn:
    """A sound reply after cuts, insertions, deletions and doublings."""
    text = canonical(name, rng, pick(LEGAL, rng))
    for _ in range(rng.integers(1, 4)):
        start, end = sorted(rng.integers(0, len(text) + 1, size=2))
        end = min(end, start + int(rng.integers(1, 12)))
        piece = pick(PIECES, rng)
        text = (
            text[:start] + piece + text[start:],
            text[:start] + text[end:],
            text[:start] + piece + text[end:],
            text[:end] + text[start:],
        )[rng.integers(4)]
    return Drawn("damaged", text, known=False)


def debris(name: str, rng: np.random.Generator) -> Drawn:
    """Any code points, the grammar's pieces in any order, or one of them over and over."""
    kind = rng.random()
    if kind < 0.4:
        text = "".join(map(chr, rng.integers(0, 0x11_0000, size=rng.integers(0, 60))))
    elif kind < 0.95:
        text = "".join(pick(PIECES, rng) for _ in range(rng.integers(0, 40)))
    else:
        text = pick(HEADS, rng) + pick(UNITS, rng) * int(rng.integers(1, 2000))
    return Drawn("debris", text, known=False)


# ---- the checks ------------------------------------------------------------------------------------------------------
def letters(text: str) -> str:
    """The letters, digits and signs of an action, of which no tolerance may add or drop one."""
    return "".join(c for c in text.casefold() if c.isalnum() or c in "+-")


def fault(name: str, drawn: Drawn, parsed: Parsed) -> str | None:
    """What is wrong with this reading, None if nothing is."""
    spans = [span for span in (parsed.thought_span, parsed.action_span) if span]
    if not all(0 <= start <= end <= len(drawn.text) for start, end in spans):
        return "a span outside the text"
    if len(spans) == 2 and max(start for start, _ in spans) < min(end for _, end in spans):
        return "spans overlap"
    if (parsed.action is None) != (parsed.error is not None):
        return "an action beside an error, or neither"
    if parsed.action is None:
        return "not read" if drawn.must else None
    if drawn.known:
        return None if parsed.action == drawn.action else "another action"
    if parsed.action not in LEGAL:
        return "no legal action"
    source = drawn.text[slice(*parsed.action_span)] if parsed.action_span else drawn.text[-1:]
    stands = parsed.action in source.lower() if name == BY_LOOKS else letters(parsed.action) in letters(source)
    exact = name in ("action_scores", BY_LOOKS) or letters(parsed.action) == letters(source)
    return None if stands and exact else "an action that isn't there"


def faults(count: int, seed: int, outcomes: Counter[tuple[str, str, bool]]) -> Iterator[str]:
    """Draw and read `count` replies for each format. `outcomes` counts (format, kind, read or not)."""
    for name, form in FORMATS.items():
        rng = np.random.default_rng([seed, NAMES.index(name)])
        for index in range(count):
            drawn = draw(name, rng)
            try:
                parsed = chosen(form.parse(drawn.text, LEGAL), rng)
                chosen(form.parse(drawn.text, None), rng)
                wrong = fault(name, drawn, parsed)
            except Exception as error:  # noqa: BLE001 (that there is none is what is checked)
                yield f"{name}, reply {index}, {drawn.kind}: {error!r} in {drawn.text[:300]!r}"
                continue
            outcomes[name, drawn.kind, parsed.action is not None] += 1
            if wrong:
                yield f"{name}, reply {index}, {drawn.kind}: {wrong}: {parsed.action!r} in {drawn.text[:500]!r}"


# ---- time ------------------------------------------------------------------------------------------------------------
HEADS = (
    *("", '{"thoughts": "', "{'thoughts': '", '{"action": ', '{"action": "hit', '{"action": "hit", "x": [', "<think>"),
    *('{"scores": {', '{"scores": {"hit": ', '"action": '),
)
UNITS = (
    *(
        "{",
        '{"',
        "{'",
        '{"a":',
        '{"a":[',
        '{"a":1 ',
        '{"a":1}',
        '{"action":1}',
        "[",
        '"',
        '" ',
        '",',
        "',",
        "\",'",
        '":',
    ),
    *(
        '"a',
        '"a":1,',
        '"Hit":1,',
        "a:1,",
        "\\",
        '\\"',
        " ",
        ", ",
        "_ ",
        "a ",
        "a _",
        "hit ",
        ".",
        "1",
        "\ud800",
        "\x00",
    ),
    *("<think>", "</think>", '{"a":"</think>"}', "<think>{", "</think>{", '"action": ', "```json\n", "turn left\n"),
)
SIZES = (25_000, 100_000, 400_000)


def seconds(form: PromptFormat, text: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()  # what others do on the machine is no time of ours
        form.parse(text, LEGAL)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile replies through every prompt format.")
    parser.add_argument("--count", type=int, default=50_000, help="replies for each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each pattern, of which the best counts")
    args = parser.parse_args()
    outcomes: Counter[tuple[str, str, bool]] = Counter()
    start, found = time.perf_counter(), 0
    for line in faults(args.count, args.seed, outcomes):
        found += 1
        print(line)
    print(
        f"{args.count} replies for each of {len(NAMES)} formats in {time.perf_counter() - start:.0f} s: {found} faults"
    )
    print(f"{'replies with an action read':<28}" + "".join(f"{name:>16}" for name in NAMES))
    for kind in sorted({kind for _, kind, _ in outcomes}):
        counts = [(outcomes[name, kind, True], outcomes[name, kind, False]) for name in NAMES]
        print(f"{kind:<28}" + "".join(f"{f'{read} of {read + none}':>16}" for read, none in counts))
    rows = []
    for name, head, unit in product(NAMES, HEADS, UNITS):
        texts = [head + unit * (size // len(unit)) for size in SIZES]
        rows.append(([seconds(FORMATS[name], text, args.repeats) for text in texts], name, head, unit))
    print(f"\n{len(rows)} patterns at 25, 100 and 400 kB, in ms of CPU, and 400 kB against 100:")
    by_ratio = sorted((row for row in rows if row[0][2] > 0.005), key=lambda row: row[0][2] / row[0][1])
    for title, ranked in (("slowest", sorted(rows, key=lambda row: row[0][2])), ("least linear", by_ratio)):
        for times, name, head, unit in ranked[:-6:-1]:
            shown = "".join(f"{1000 * value:>9.1f}" for value in times)
            print(f"{title:<14}{shown}{times[2] / times[1]:>7.1f}  {name:<14}{head!r} + n * {unit!r}")
    print(f"median of the ratios: {np.median([times[2] / times[1] for times, *_ in by_ratio]):.2f}")


if __name__ == "__main__":
    main()
