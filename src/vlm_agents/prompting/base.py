"""What the prompt formats share: the chat around an observation, the object a reply holds, and action matching.

Not a base class: a format is any class with the methods of `PromptFormat`, made of these functions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from vlm_agents.config import PromptConfig
from vlm_agents.errors import ConfigError
from vlm_agents.imports import told
from vlm_agents.prompting.objects import Field, is_json, objects_in
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.types import Message, Observation, Parsed, Prompt, Span, Turn

LegalActions = tuple[str, ...] | None


class PromptFormat(Protocol):
    """How an observation becomes a prompt, a reply an action, and an expert's advice a reply."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply, beside its own end; they stay in it."""
        ...

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt: ...

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        """Read a reply. Never raises, guesses or draws: what holds no legal action has `error` set.

        What stands behind a reasoning model's thinking is the answer; a draft within the thinking never counts.
        Errors begin with words that can be counted: empty reply, no answer, no JSON, no <key> key, empty action,
        illegal action, cut off after, no code or answer, no scores, no score for, bad score. Spans are set wherever
        the reply has the part, even beside an error. A format that leaves the choice to chance gives `choices`.
        """
        ...

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        """The canonical reply that says this."""
        ...


def check_format(prompt_format: PromptFormat, name: str = "the format") -> None:
    """ConfigError, which calls it `name`, for a format that can't read what it writes, or raises at what a model may
    say."""
    words = ("turn left", "stay", "stay here")
    now, said = Observation("seen", legal_actions=words), ["", " ", "{", "no such word", "\u2028\x00"]
    try:
        prompt = prompt_format.prompt("rules", (), now)
        if not (prompt and all(isinstance(message, Message) for message in prompt) and prompt[-1].role == "user"):
            raise ConfigError(f"{name}: its prompt is no tuple of Messages that ends with the user's")
        for word in words:
            reply = prompt_format.write("a thought", word, words)
            parsed = prompt_format.parse(reply, words)
            if parsed.action != word:
                raise ConfigError(f"{name}: it writes {reply!r:.80} for '{word}' and reads '{parsed.action}' in it")
            said.append(reply[: len(reply) // 2])
        for reply in said:
            parsed = prompt_format.parse(reply, words)
            if (parsed.action is None) == (parsed.error is None) or parsed.action not in (None, *words):
                raise ConfigError(f"{name}: in {reply!r} it reads {parsed}: a legal action, or an error, and not both")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: {told(error)}") from error


@dataclass(frozen=True, slots=True)
class Fitted:
    """A format whose prompts go through `fit`, which cuts them to what a model takes."""

    format: PromptFormat
    fit: Callable[[Prompt], Prompt]

    @property
    def stop(self) -> tuple[str, ...]:
        return self.format.stop

    def prompt(self, instructions: str, history: Sequence[Turn], now: Observation) -> Prompt:
        return self.fit(self.format.prompt(instructions, history, now))

    def parse(self, text: str, legal_actions: LegalActions) -> Parsed:
        return self.format.parse(text, legal_actions)

    def write(self, thought: str, action: str, legal_actions: LegalActions) -> str:
        return self.format.write(thought, action, legal_actions)


# ---- prompts ---------------------------------------------------------------------------------------------------------
def chat(system: str, history: Sequence[Turn], now: Observation, cfg: PromptConfig) -> Prompt:
    """System message with the task, the past as `cfg.history` wants it, and what is seen now."""
    messages = [Message("system", ("\n".join(filter(None, (system, now.task))),))]
    recent = history[-cfg.last_k :]
    if cfg.history == "full":
        for turn in history:
            messages.append(Message("user", _shown(turn.observation, cfg).parts))
            messages.append(Message("assistant", (turn.reply.text,), token_ids=turn.reply.token_ids or None))
    elif cfg.history == "last_k" and history:
        now = replace(now, text="\n".join(filter(None, (now.text, past_line(recent)))))
    elif cfg.history == "answers" and history:
        now = _after(past_lines(recent), now)
    return (*messages, Message("user", _shown(now, cfg).parts))


def _shown(seen: Observation, cfg: PromptConfig) -> Observation:
    """With the legal actions below, where they are to be shown."""
    if not cfg.show_actions or seen.legal_actions is None:
        return seen
    return replace(seen, text="\n".join(filter(None, (seen.text, f"Actions: {', '.join(seen.legal_actions)}"))))


def _after(past: str, now: Observation) -> Observation:
    """With what was before in front of the text."""
    return replace(now, text=f"{past}\n{now.text}", places=tuple(len(past) + 1 + place for place in now.places))


def past_line(turns: Sequence[Turn]) -> str:
    """`Before: turn left; go forward, no effect; invalid`, oldest first."""
    return "Before: " + "; ".join(map(outcome, turns))


def past_lines(turns: Sequence[Turn]) -> str:
    """What was told and done, in lines, oldest first; what the last action led to is what is seen now. Where nothing is
    told but by pictures, whether it did something."""
    told = (turn.observation.text for turn in turns)
    return "\n".join(
        f"{text}\n> {turn.parsed.action or 'invalid'}" if text else f"> {outcome(turn)}"
        for text, turn in zip(told, turns, strict=True)
    )


def outcome(turn: Turn) -> str:
    if turn.parsed.action is None:
        return "invalid"
    return turn.parsed.action + (", no effect" if not turn.step.changed else "")


# ---- replies ---------------------------------------------------------------------------------------------------------
def drawn(parsed: Parsed, rng: np.random.Generator) -> Parsed:
    """The reading with its action drawn, where the reply leaves that to chance. Only a draw moves `rng`."""
    if not parsed.choices:
        return parsed
    place = rng.choice(len(parsed.choices), p=list(parsed.choices.values()))
    return replace(parsed, action=list(parsed.choices)[place])


class Found(NamedTuple):
    """What a JSON reply holds: the answer's field, or an error."""

    answer: Field | None
    thought_span: Span | None
    error: str | None = None


def find_object(text: str, key: str) -> Found:
    """The field `key` and the thoughts of the answer's first object that has `key`, sound JSON before the rest."""
    start, error = answer_start(text)
    chosen: dict[str, Field] | None = None
    for fields, place in () if error else objects_in(text, start):
        if chosen is None or (key in fields and key not in chosen):
            chosen = fields
        if key in fields and is_json(text[slice(*place)]):
            chosen = fields
            break
    if chosen is None:
        return Found(None, (0, start) if start else None, error or "no JSON")
    answer, thoughts = chosen.get(key), chosen.get("thoughts")
    span = thoughts.span if thoughts else None
    if start:  # one thought from the thinking to the end of `thoughts`, as far as the answer doesn't stand between
        span = (0, span[1] if span and not (answer and answer.span < span) else start)
    return Found(answer, span, None if answer else f"no {key} key")


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
