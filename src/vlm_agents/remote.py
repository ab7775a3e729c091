"""A chat model behind an OpenAI-compatible server: prompts go in, completions come out in order.

Knows HTTP, and nothing of games or replies' formats. What was answered once, to this run or to another one, is not
asked again: see `answers`. The key goes into the request's header and nowhere else.
"""

import base64
import io
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from PIL.Image import Image

from vlm_agents.answers import Answers, Completion
from vlm_agents.config import RemoteConfig
from vlm_agents.errors import ConfigError, ModelError, did_you_mean
from vlm_agents.types import Message, Prompt

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries; it doubles
PATIENCE_S = 600.0  # a server that asks to stay away for longer is given up
QUOTED = 300  # characters of a server's message in an error
LISTED = 20  # models of a server in an error

logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request


class ChatClient:
    """POST {url}/chat/completions, from `cfg.concurrency` threads. `folder` keeps the run's answers."""

    def __init__(self, cfg: RemoteConfig, folder: Path) -> None:
        self._cfg = cfg
        self._key = os.environ.get(cfg.key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"${cfg.key_env} holds characters that no key has: set it anew")
        self._stop = threading.Event()
        self._answers = Answers(folder, Path(cfg.cache), cfg.url.rstrip("/"))
        self._http = httpx2.Client(
            base_url=cfg.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=cfg.timeout_s,
            limits=httpx2.Limits(max_connections=cfg.concurrency),
            trust_env=not on_loopback(cfg.url),  # no proxy leads to this machine's own loopback
        )

    def close(self) -> None:
        self._http.close()

    def complete(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        temperature: float,
        *,
        seeds: Sequence[int] | None = None,
        readable: Callable[[int, str], bool] = lambda _index, _text: True,
        samples: int = 1,
    ) -> list[Completion]:
        """One completion a prompt, in order; ModelError when the server can't give one.

        Where `readable(index, text)` says no, a fresh sample is drawn, at most `samples` in all; the last one stands.
        Equal prompts with equal `seeds` (0 by default) are one question.
        """
        seeds = [0] * len(prompts) if seeds is None else seeds
        requests = [
            {
                "model": self._cfg.model,
                "messages": [message_json(message) for message in prompt],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        questions = [encoded(request) for request in requests]
        places = {question: index for index, question in enumerate(questions)}  # none is asked twice at once

        def ask(index: int) -> Completion:
            return self._ask(requests[index], lambda text: readable(index, text), samples)

        self._stop.clear()
        with ThreadPoolExecutor(self._cfg.concurrency) as pool:
            try:
                answers = dict(zip(places, pool.map(ask, places.values()), strict=True))
            finally:
                self._stop.set()  # after an error nobody waits for another try
        return [answers[question] for question in questions]

    def counts(self) -> dict[str, float]:
        """What the answers of this run cost, see Answers.counts."""
        return self._answers.counts()

    def _ask(self, request: dict[str, Any], readable: Callable[[str], bool], samples: int) -> Completion:
        answer = self._answer(request, readable)
        for again in range(1, samples):
            if answer.readable:
                break
            # hot enough to say something else
            fresh = {"seed": request["seed"] + again, "temperature": max(request["temperature"], 1.0)}
            answer = self._answer({**request, **fresh}, readable)
        return answer

    def _answer(self, request: dict[str, Any], readable: Callable[[str], bool]) -> Completion:
        """The kept answer to exactly this request, else the server's."""
        question = encoded(request)
        if kept := self._answers.of_run(question):
            return kept
        answer = self._answers.of_cache(question) or self._read(self._post(question))
        answer = replace(answer, readable=readable(answer.text))
        self._answers.keep(question, answer)
        return answer

    # ---- HTTP ------------------------------------------------------------------------------------------------------
    def _post(self, body: bytes) -> httpx2.Response:
        """The server's answer; ModelError if it refuses, or still fails after `retries` more tries."""
        headers = {"Content-Type": "application/json"}
        tries = 0
        while True:
            tries += 1
            try:
                outcome = self._http.post("chat/completions", content=body, headers=headers)
            except httpx2.RequestError as error:
                outcome = error
            else:
                if outcome.is_success:
                    return outcome
                if not may_pass(outcome.status_code):
                    raise self._error(f"status {outcome.status_code}", self._fix(outcome), outcome)
            wait = waiting_time(outcome, tries)
            if tries > self._cfg.retries or wait > PATIENCE_S or self._stop.wait(wait):
                raise self._gave_up(outcome, tries, wait)

    def _gave_up(self, outcome: httpx2.Response | httpx2.RequestError, tries: int, wait: float) -> ModelError:
        again = "Then give the same command again: what was answered is kept"
        if isinstance(outcome, httpx2.Response):
            fix = f"wait for {wait:.0f} s" if wait > PATIENCE_S else "see its log, or lower stage.remote.concurrency"
            return self._error(f"status {outcome.status_code}, {tries} times", f"{fix}. {again}", outcome)
        if isinstance(outcome, httpx2.TimeoutException):
            fix = "raise stage.remote.timeout_s or lower stage.remote.concurrency"
            return self._error(f"no answer within {self._cfg.timeout_s:g} s, {tries} times", f"{fix}. {again}")
        fix = f"is the server running there, and is stage.remote.url right? {again}"
        return self._error(f"can't be reached ({outcome}), {tries} times", fix)

    def _fix(self, response: httpx2.Response) -> str:
        """How to mend what the server refused."""
        cfg = self._cfg
        match response.status_code:
            case 401 | 403:
                return f"${cfg.key_env} {'holds a key that is refused' if self._key else 'is empty'}: set it to a key"
            case 400 | 404 if (models := self._models()) and cfg.model not in models:
                known = ", ".join(models[:LISTED])
                return f"set stage.remote.model to one of {known}.{did_you_mean(cfg.model, models)}"
            case 404 | 405:
                return "stage.remote.url is the part before /chat/completions and mostly ends in /v1: is it right?"
            case _ if response.has_redirect_location:
                return f"it moved to {response.headers['Location']}: set stage.remote.url accordingly"
        return "the server can't serve this request, see what it says"

    def _models(self) -> list[str]:
        """The models that the server lists, if it does."""
        try:
            return [str(model["id"]) for model in self._http.get("models").json()["data"]]
        except (httpx2.RequestError, ValueError, KeyError, TypeError):
            return []

    def _read(self, response: httpx2.Response) -> Completion:
        try:
            body = response.json()
            choice, usage = body["choices"][0], body.get("usage") or {}
            content = choice["message"].get("content") or ""
            return Completion(
                text=content.encode(errors="replace").decode(),  # half a surrogate pair can be said, but not be stored
                finish="length" if choice.get("finish_reason") == "length" else "stop",
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            fix = "is stage.remote.url the part before /chat/completions of an OpenAI-compatible server?"
            raise self._error("what came back is no chat completion", fix, response) from error

    def _error(self, what: str, fix: str, response: httpx2.Response | None = None) -> ModelError:
        said = "" if response is None else " ".join(response.text.split())
        if self._key:
            said = said.replace(self._key, f"${self._cfg.key_env}")  # some servers repeat it
        quote = f" ({said[:QUOTED]})" if said else ""
        return ModelError(f"{self._cfg.url.rstrip('/')}/chat/completions: {what}{quote}: {fix}")


# ---- requests --------------------------------------------------------------------------------------------------------
def message_json(message: Message) -> dict[str, Any]:
    """The message as OpenAI's API has it: bare text, or parts with the pictures first."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in message.images]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


def data_url(image: Image) -> str:
    png = io.BytesIO()
    image.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def encoded(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode()


# ---- tries -----------------------------------------------------------------------------------------------------------
def may_pass(status: int) -> bool:
    """Is this status worth another try?"""
    return status in (408, 409, 429) or status >= 500


def waiting_time(outcome: httpx2.Response | httpx2.RequestError, tries: int) -> float:
    """Seconds until the next try: what the server asks for, else doubling, with jitter so that threads spread."""
    asked = retry_after(outcome.headers.get("Retry-After", "")) if isinstance(outcome, httpx2.Response) else 0.0
    return asked or random.uniform(0.5, 1.0) * min(FIRST_WAIT_S * 2 ** (tries - 1), LONGEST_WAIT_S)


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, which holds seconds or a date; 0 without a sound one."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


def on_loopback(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return parts.scheme == "http" and (host in ("localhost", "::1") or host.startswith("127."))
