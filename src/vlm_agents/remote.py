"""A chat model behind an OpenAI-compatible server: prompts go in, completions come out in order.

Knows requests, and nothing of games, replies' formats or HTTP. What was answered once, to this run or to another one,
is not asked again: see `answers`. A prompt that the server refuses or fails at, while it answers the same question
with nothing in it, is answered by an empty text, and the run goes on.
"""

import asyncio
import base64
import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_agents.answers import Answers, Completion
from vlm_agents.config import RemoteConfig
from vlm_agents.endpoint import PATIENCE_S, Endpoint, Failing, Unavailable, all_at, give_up
from vlm_agents.errors import ModelError
from vlm_agents.pictures import Picture
from vlm_agents.types import Message, Prompt, Sampling

logger = logging.getLogger(__name__)

PROBES = 3  # times that a judge is asked its first question, each with all its retries
IN_A_ROW = 16  # refused prompts, or two for each request under way, without one answer between: no prompt's fault


class ChatClient:
    """Asks from `cfg.concurrency` coroutines at once. `folder` keeps the run's answers. `heard` is called with
    each, wherever it comes from."""

    def __init__(self, cfg: RemoteConfig, folder: Path, heard: Callable[[], object] = lambda: None) -> None:
        self._cfg = cfg
        self._heard = heard
        self._endpoint = Endpoint(cfg)
        self._folder = folder
        self._answers = Answers(folder, Path(cfg.cache), self._endpoint.known_by)
        self._loop = asyncio.Runner()
        self._refused: list[tuple[bytes, Completion]] = []  # since the last answer; not kept until the next one

    def close(self) -> None:
        self._loop.run(self._endpoint.close())
        self._loop.close()

    def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        temperature: float,
        *,
        seeds: Sequence[int] | None = None,
        readable: Callable[[int, str], bool] = lambda _index, _text: True,
        samples: int = 1,
    ) -> list[Completion]:
        """One completion a prompt, in order; ModelError when the server can't give one.

        `temperature` is that of a `sampling` that isn't greedy. Where `readable(index, text)` says no, a fresh sample
        is drawn, at most `samples` in all; the last one stands. Equal prompts with equal `seeds` (0 by default) are
        one question.
        """
        seeds = [0] * len(prompts) if seeds is None else seeds
        requests = [
            self._request(prompt, sampling, temperature, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        questions = [self._question(request) for request in requests]
        places = {question: index for index, question in enumerate(questions)}  # none is asked twice at once

        async def ask_all() -> list[Completion]:
            asking = (self._ask(requests[index], partial(readable, index), samples) for index in places.values())
            return await all_at(self._cfg.concurrency, asking)

        answers = dict(zip(places, self._loop.run(ask_all()), strict=True))
        return [answers[question] for question in questions]

    def counts(self) -> dict[str, float]:
        """What the answers of this run cost, see Answers.counts."""
        self._keep_refused()
        return self._answers.counts()

    def why_unread(self) -> str:
        """What became of the answers that could not be read, what may help, and where they are."""
        self._keep_refused()
        answers = self._answers.all_of_run()
        unread = [answer for answer in answers if not answer.readable]
        refused = [answer.refused for answer in unread if answer.refused]
        cut = sum(answer.finish == "length" for answer in unread)
        field = next((name for name in self._cfg.request or () if name.startswith("max_")), "max_tokens")
        reasons = [
            f"{cut} were cut off ('{self._cfg.place}.request={{{field}: 1024}}' allows more)" if cut else "",
            f"{len(refused)} were refused ({refused[0]})" if refused else "",
            f"{other} say something else (a bigger model may do better)"
            if (other := len(unread) - cut - len(refused))
            else "",
        ]
        said = ", ".join(filter(None, reasons))
        return f"of {len(answers)} answers {len(unread)} can't be read: {said}. See {os.path.relpath(self._folder)}"

    def _request(self, prompt: Prompt, sampling: Sampling, temperature: float, seed: int) -> dict[str, Any]:
        return {
            "model": self._cfg.model,
            "messages": [message_json(message) for message in prompt],
            "max_tokens": sampling.max_tokens,
            "temperature": 0.0 if sampling.greedy else temperature,
            "seed": seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }

    async def _ask(self, request: dict[str, Any], readable: Callable[[str], bool], samples: int) -> Completion:
        answer = await self._answer(request, readable)
        for again in range(1, samples):
            if answer.readable or answer.refused:
                break
            # hot enough to say something else
            fresh = {"seed": request["seed"] + again, "temperature": max(request["temperature"], 1.0)}
            answer = await self._answer({**request, **fresh}, readable)
        return answer

    async def _answer(self, request: dict[str, Any], readable: Callable[[str], bool]) -> Completion:
        """The kept answer to exactly this request, else the server's."""
        question = self._question(request)
        if kept := self._answers.of_run(question):
            self._heard()
            return kept
        answer = self._answers.of_cache(question) or await self._said(self._sent(request))
        text = self._endpoint.masked(answer.text)  # the cache may be older than the masking
        answer = replace(answer, text=text, readable=not answer.refused and readable(text))
        if answer.refused:
            self._refused.append((question, answer))
        else:
            self._keep_refused()
            self._keep(question, answer)
        self._heard()
        return answer

    async def _said(self, request: dict[str, Any]) -> Completion:
        """The server's answer, an empty one where it can't take this prompt; ModelError where it can't take any."""
        try:
            return await self._endpoint.complete(request, self._cfg.retries, PATIENCE_S)
        except Unavailable:
            raise
        except ModelError as error:
            try:
                await self._endpoint.complete(blank(request), min(self._cfg.retries, 1), 0.0)
            except ModelError:
                raise error from None
            in_a_row = len(self._refused) + 1
            if in_a_row >= max(IN_A_ROW, 2 * self._cfg.concurrency):
                raise ModelError(f"{error} ({in_a_row} prompts in a row came to this)") from error
            return Completion("", "stop", 0, 0, refused=str(error))

    def _keep(self, question: bytes, answer: Completion) -> None:
        self._answers.keep(question, answer)

    def _keep_refused(self) -> None:
        """The server answers: what it refused before stays refused, and a resumed run won't ask for it."""
        while self._refused:
            self._answers.keep(*self._refused.pop())

    def _question(self, request: dict[str, Any]) -> bytes:
        """What names the answer: our request, with its seed even where none is sent, and how it is changed."""
        changes = self._cfg.request
        return encoded(request) + (b" " + json.dumps(changes, sort_keys=True).encode() if changes else b"")

    def _sent(self, request: dict[str, Any]) -> dict[str, Any]:
        fields = request | (self._cfg.request or {})
        return {name: value for name, value in fields.items() if value is not None}


class ForgivingClient(ChatClient):
    """One question's failure is that question's alone: its answer is empty, and `refused` says why. Neither that is
    kept nor what can't be read, for another time it may be answered."""

    def probe(self, prompt: Prompt, sampling: Sampling) -> None:
        """Ask the server, whatever is kept; ModelError where nobody is there, or it fails again and again."""
        request = self._sent(self._request(prompt, sampling, temperature=0.0, seed=0))
        for left in reversed(range(PROBES)):
            try:
                self._loop.run(self._endpoint.complete(request, self._cfg.retries, 0.0))
                return
            except Failing as error:
                if not left:
                    raise
                logger.warning("the first question failed, and is asked again: %s", error)

    def cancel(self) -> None:
        """Give up what another thread asks: its `complete` raises CancelledError."""
        give_up(self._loop)

    async def _said(self, request: dict[str, Any]) -> Completion:
        try:
            return await self._endpoint.complete(request, self._cfg.retries, 0.0)
        except ModelError as error:
            return Completion("", "stop", 0, 0, refused=str(error))

    def _keep(self, question: bytes, answer: Completion) -> None:
        if answer.readable:
            super()._keep(question, answer)

    def _keep_refused(self) -> None:
        self._refused.clear()


# ---- requests --------------------------------------------------------------------------------------------------------
# What chat templates and tokenizers of servers take for more than text: <|im_end|>, </s>, [/INST], <image>, ...
# Known spellings alone, since HTML and the thoughts of a model are text that a server shall see as it is.
CONTROL = re.compile(
    r"""<(?= [|\uff5c] [^<>\s]{1,64} [|\uff5c] >
           | / ? (?: s | unk | pad | bos | eos | mask | BOS_TOKEN | EOS_TOKEN | (?i: img | image | video | audio) [\w-]*
                   | im_\w+ | (?: start | end | begin | fake) _ (?: of | token) _\w+ | (?: start | end) _header_id
                   | row_\d+_col_\d+ | global-img | patch | ref | box | quad | point ) >
           | /? <? /? SYS >> )
      | \[(?= /? (?: INST | SYSTEM_PROMPT | AVAILABLE_TOOLS | TOOL_CALLS | TOOL_RESULTS | TOOL_CONTENT | ARGS | THINK
                   | IMG | IMG_BREAK | IMG_END | AUDIO | BEGIN_AUDIO | PREFIX | MIDDLE | SUFFIX ) \] )""",
    re.VERBOSE,
)


def plain(text: str) -> str:
    """The text with an invisible word joiner (U+2060) in what spells a control token or a picture's place.

    A server tokenises the whole chat as one text: what an env or a model says would end turns, or stand for pictures.
    """
    return CONTROL.sub(lambda found: f"{found[0]}\u2060", text)


def message_json(message: Message, escaped: Callable[[str], str] = plain) -> dict[str, Any]:
    """The message as OpenAI's API has it: bare text, or its parts where there are pictures among them. Texts are
    `escaped`."""
    if not message.images:
        return {"role": message.speaker, "content": escaped(message.text)}
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(part)}}
        if isinstance(part, Picture)
        else {"type": "text", "text": escaped(part)}
        for part in message.parts
    ]
    return {"role": message.speaker, "content": content}


def blank(request: dict[str, Any]) -> dict[str, Any]:
    """The same question with nothing in it: as many small white pictures, and a plain text for each text."""
    white = data_url(Picture(Image.new("RGB", (64, 64), "white")))

    def emptied(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return "Say yes."
        return [
            {"type": "text", "text": "Say yes."}
            if part["type"] == "text"
            else {"type": "image_url", "image_url": {"url": white}}
            for part in content
        ]

    return request | {"messages": [one | {"content": emptied(one["content"])} for one in request["messages"]]}


def data_url(picture: Picture) -> str:
    png = io.BytesIO()
    picture.image.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def encoded(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode()
