"""A chat model that rates each step of an episode 0-10. It knows what was seen and done, and no reward.

A rating that can't be read stays out; it is never 0, for that would be a verdict.
"""

import json
from collections.abc import Iterator, Sequence

from vlm_agents.prompting.objects import is_json, objects_in
from vlm_agents.prompting.thinking import answer_start
from vlm_agents.remote import ChatClient
from vlm_agents.types import Message, Prompt, Sampling, Turn

SAMPLES = 3  # answers to one question, until one can be read
MAX_TOKENS = 256

RULE = """\
You rate single steps of an agent that acts in a world which it sees in pictures. You learn what the agent was told, \
what it saw before the step, what it thought and did, and what was to be seen after the step.
Rate from 0 to 10 how much the step helps to reach the agent's goal: 10 is the best step there was, 5 changes nothing, \
0 leads away from the goal or makes it impossible.
Answer in JSON, and with nothing else: {"score": 7}"""


class Rater:
    """Asks a chat model for the ratings."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    def rate(self, turns: Sequence[Turn]) -> list[float | None]:
        """The score of each turn's step; None where no sample of the answer held one."""
        answers = self._client.complete(
            [question(turn) for turn in turns],
            Sampling(MAX_TOKENS),
            temperature=0.0,
            readable=lambda _, text: read_score(text) is not None,
            samples=SAMPLES,
        )
        return [read_score(answer.text) for answer in answers]


def question(turn: Turn) -> Prompt:
    """The step, in one message: some chat templates take no two of one role in a row."""
    before, after, reply = turn.observation, turn.step.observation, turn.reply.text
    told = "\n".join(message.text for message in turn.prompt if message.role == "system")
    span = turn.parsed.thought_span
    lines = [
        f"The agent was told:\n{told}\n",
        f"The first {len(before.images)} of the pictures: before the step. The last {len(after.images)}: after it.",
        f"Before the step: {before.text}",
        f"The agent thought: {reply[slice(*span)] if span else '(nothing)'}",
        f"The agent did: {turn.parsed.action or '(nothing: its reply held no legal action)'}",
        f"After the step: {after.text}",
    ]
    return Message("system", (RULE,)), Message("user", (*before.images, *after.images, "\n".join(lines)))


def read_score(text: str) -> float | None:
    """The score from 0 to 10 that the answer's JSON objects agree on; None where they don't, or there is none."""
    scores = set(scores_in(text))
    return scores.pop() if len(scores) == 1 else None


def scores_in(text: str) -> Iterator[float]:
    """Of the answer's objects of sound JSON; a draft in the model's thinking is no rating."""
    start, error = answer_start(text)
    for _, (first, last) in () if error else objects_in(text, start):
        score = json.loads(text[first:last]).get("score") if is_json(text[first:last]) else None
        if isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 10:
            yield float(score)
