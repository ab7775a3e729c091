"""What a policy is told: golden texts for each history, and prompts that extend each other."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_agents.config import PromptConfig
from vlm_agents.errors import ConfigError
from vlm_agents.pictures import Picture
from vlm_agents.prompting import make_format
from vlm_agents.types import Message, Observation, Parsed, Prompt, Reply, Role, Step, Turn

FORMATS = ("cot_json", "action_only", "action_scores")
GAME = "Reach the goal."


def observation(number: int) -> Observation:
    return Observation(
        f"look {number}", (Picture(Image.new("RGB", (28, 28), (number, 0, 0))),), ("turn left", "go forward")
    )


def turn(number: int, action: str | None, changed: bool, token_ids: tuple[int, ...] = ()) -> Turn:
    """Turn `number`, seen as `look <number>`; its `prompt` is left empty, since no later prompt may depend on it."""
    reply = Reply(f"reply {number}", token_ids=token_ids)
    step = Step(observation(number + 1), 0.0, False, False, False, True, changed)
    return Turn(observation(number), (), reply, Parsed(action), step)


PAST = (
    turn(0, "turn left", changed=True, token_ids=(5, 6, 2)),
    turn(1, "go forward", changed=False, token_ids=(7, 2)),
    turn(2, None, changed=False, token_ids=(8,)),
    turn(3, "turn left", changed=True),
)


def prompt(history: str, past: tuple[Turn, ...], name: str = "cot_json", last_k: int = 4) -> Prompt:
    prompt_format = make_format(PromptConfig(format=name, history=history, last_k=last_k))
    return prompt_format.prompt(GAME, past, observation(len(past)))


def said(messages: Prompt) -> list[tuple[Role, str]]:
    return [(message.role, message.text) for message in messages]


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("cot_json", 'Reach the goal.\nAnswer in JSON: {"thoughts": "...", "action": "..."}'),
        ("action_only", "Reach the goal.\nAnswer with the action only."),
        (
            "action_scores",
            'Reach the goal.\nScore each action 1-5 in JSON: {"thoughts": "...", "scores": {"<action>": 3, ...}}',
        ),
    ],
)
def test_system_message_is_the_same_over_a_run(name: str, system: str) -> None:
    for history in ("none", "last_k", "full"):
        for past in ((), PAST):
            messages = prompt(history, past, name)
            assert messages[0] == Message("system", (system,))
            assert [message.role for message in messages].count("system") == 1


@pytest.mark.parametrize("name", FORMATS)
def test_without_history_only_the_present_is_shown(name: str) -> None:
    assert prompt("none", PAST, name)[1:] == (Message("user", (*observation(4).images, "look 4")),)


@pytest.mark.parametrize(
    ("past", "last_k", "text"),
    [
        ((), 4, "look 0"),
        (PAST[:1], 4, "look 1\nBefore: turn left"),
        (PAST, 4, "look 4\nBefore: turn left; go forward, no effect; invalid; turn left"),
        (PAST, 2, "look 4\nBefore: invalid; turn left"),
        (PAST, 1, "look 4\nBefore: turn left"),
    ],
)
def test_last_k_is_one_line_oldest_first(past: tuple[Turn, ...], last_k: int, text: str) -> None:
    messages = prompt("last_k", past, last_k=last_k)
    assert messages[1:] == (Message("user", (*observation(len(past)).images, text)),)


def test_last_k_needs_no_observation_text() -> None:
    now = Observation("")
    prompt_format = make_format(PromptConfig(format="cot_json", history="last_k"))
    assert prompt_format.prompt(GAME, PAST[:1], now)[-1].text == "Before: turn left"
    assert prompt_format.prompt(GAME, (), now)[-1].text == ""


def test_answers_are_what_was_seen_and_done_oldest_first() -> None:
    messages = prompt("answers", PAST, last_k=3)
    assert messages[1:] == (
        Message(
            "user",
            (*observation(4).images, "look 1\n> go forward\nlook 2\n> invalid\nlook 3\n> turn left\nlook 4"),
        ),
    )


def test_answers_by_pictures_alone_say_what_did_nothing() -> None:
    past = tuple(replace(turn, observation=replace(turn.observation, text="")) for turn in PAST[:2])
    message = prompt("answers", past)[-1]
    assert message.text == "> turn left\n> go forward, no effect\nlook 2"


def test_answers_push_the_places_of_pictures_back() -> None:
    now = Observation("a  b", observation(1).images, places=(2,))
    message = make_format(PromptConfig(format="cot_json", history="answers")).prompt(GAME, PAST[:1], now)[-1]
    assert message.parts == ("look 0\n> turn left\na ", *now.images, " b")


@pytest.mark.parametrize("history", ["none", "answers", "full"])
def test_actions_are_shown_below_what_is_seen(history: str) -> None:
    shown = make_format(PromptConfig(format="cot_json", history=history, show_actions=True))
    messages = shown.prompt(GAME, PAST[:1], Observation("now", legal_actions=("take", "look"), task="Eat."))
    assert messages[-1].text.endswith("now\nActions: take, look")
    assert messages[0].text.endswith("\nEat.")
    assert ("look 0\nActions: turn left, go forward" in messages[1].text) == (history == "full")


def test_full_history_is_the_whole_chat() -> None:
    messages = prompt("full", PAST[:2])
    assert said(messages)[1:] == [
        ("user", "look 0"),
        ("assistant", "reply 0"),
        ("user", "look 1"),
        ("assistant", "reply 1"),
        ("user", "look 2"),
    ]
    assert [message.token_ids for message in messages] == [None, None, (5, 6, 2), None, (7, 2), None]
    reds = [[np.asarray(seen.image)[0, 0, 0] for seen in message.images] for message in messages]
    assert reds == [[], [0], [], [1], [], [2]]


@pytest.mark.parametrize("name", FORMATS)
def test_full_history_extends_prompt_and_reply(name: str) -> None:
    for length in range(len(PAST)):
        before, after = prompt("full", PAST[:length], name), prompt("full", PAST[: length + 1], name)
        reply = PAST[length].reply
        assert after[:-1] == (*before, Message("assistant", (reply.text,), token_ids=reply.token_ids or None))


def test_a_scripted_reply_has_no_tokens_to_repeat() -> None:
    assert prompt("full", PAST)[-2] == Message("assistant", ("reply 3",), token_ids=None)


def test_every_configurable_format_can_be_made() -> None:
    with pytest.raises(ConfigError, match="cot_json, action_only, action_scores"):  # the names that the schema takes
        PromptConfig(format="cot_jsonn")
    for name in FORMATS:
        make_format(PromptConfig(format=name))
