"""The address of an OpenAI-compatible server: a request goes in, a completion comes out, or an error that helps.

Knows HTTP: tries and waits, how long an answer may take and how big it may be, what a refusal means. Nothing of
prompts, nor of what is kept. The key goes into the request's header and nowhere else: where a server repeats it, plain
or as a URL has it, the name of its variable stands instead.
"""

import asyncio
import json
import logging
import os
import random
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2

from vlm_agents.answers import Completion
from vlm_agents.config import EndpointConfig, RemoteConfig
from vlm_agents.errors import ConfigError, ModelError, did_you_mean
from vlm_agents.handover import find

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries; it doubles
PATIENCE_S = 600.0  # longer, a server that has answered may not be away, and none may ask us to stay away
LARGEST = 8 * 2**20  # bytes of an answer, unpacked
QUOTED = 300  # characters of a server's message in an error
LISTED = 20  # models of a server in an error
SHORTEST_KEY = 8  # characters; what stands in for a key where none is needed ("none", "EMPTY") is an ordinary word

logger = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP answer, read to its end."""

    status: int
    headers: httpx2.Headers
    body: bytes


class Unreadable(Exception):
    """What came back is no answer to what was asked; gateways say such things while they are overloaded.

    `fix`: what to do about it, where its reader knows.
    """

    def __init__(self, body: bytes, fix: str = "") -> None:
        super().__init__()
        self.body, self.fix = body, fix


class UnknownModel(ModelError):
    """The server says that it has no model of this name."""


class Failing(ModelError):
    """The server is there, and failed at a request again and again; another one it may answer."""


class Unavailable(ModelError):
    """The server can't be reached, or takes no request now: no prompt's fault, and another time it may be otherwise."""


Failure = Response | Unreadable | TimeoutError | httpx2.RequestError
CHAT = "chat/completions"
Answer = TypeVar("Answer")


class Endpoint:
    """POST {url}/chat/completions, or to another path. Its coroutines belong into one event loop."""

    def __init__(self, cfg: EndpointConfig) -> None:
        self._cfg = cfg
        served = find(cfg) if cfg.auto else None
        self.url = served.url if served else cfg.url
        self.known_by = f"{served.model} {served.weights}" if served else cfg.url.rstrip("/")
        self._key = (served.key or "") if served else os.environ.get(cfg.key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"${cfg.key_env} holds characters that no key has: set it anew")
        self._last_answer: float | None = None
        self._away = False
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=None,  # a whole try has one, see _say
                follow_redirects=False,  # the key is for nobody else
                limits=httpx2.Limits(max_connections=cfg.concurrency),
                trust_env=not (served or on_this_machine(cfg.url)),  # no proxy is asked for what is ours
            )
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            raise ConfigError(f"the proxy or certificates that the environment names can't be used: {error}") from error

    async def close(self) -> None:
        await self._http.aclose()

    async def complete(self, request: Mapping[str, Any], retries: int, patience: float) -> Completion:
        """What the server says in a chat."""
        return await self.post(CHAT, request, self._read, retries, patience)

    async def post(
        self, path: str, request: Mapping[str, Any], read: Callable[[bytes], Answer], retries: int, patience: float
    ) -> Answer:
        """The server's answer, as `read` has it, which raises Unreadable for what is none. ModelError if the server
        refuses, or still fails after `retries` more tries.

        A server that has answered before may be restarting: it is waited for up to `patience` seconds.
        """
        body = json.dumps(request).encode()
        failing: float | None = None  # since when
        tries = 0
        while True:
            tries += 1
            try:
                said = await self._say("POST", path, body)
                if 200 <= said.status < 300:
                    answer = read(said.body)
                    self._last_answer, self._away = time.monotonic(), False
                    return answer
                failure: Failure = said
            except (Unreadable, TimeoutError, httpx2.RequestError) as error:
                failure = error
            failing = failing or time.monotonic()
            if knows_no_model(failure, request) or not self._may_pass(failure):
                raise await self._refused(path, failure, request)
            wait = waiting_time(failure, tries)
            away = bool(retries) and self._is_away(failure, failing) and time.monotonic() + wait < failing + patience
            if wait > PATIENCE_S or not (tries <= retries or away):
                raise self._gave_up(path, failure, tries, wait)
            if tries > retries and not self._away:
                self._away = True
                logger.warning("%s is away: asked again for up to %.0f minutes", self._address(path), patience / 60)
            await asyncio.sleep(wait)

    async def _say(self, method: str, path: str, body: bytes | None = None) -> Response:
        """One HTTP exchange, which takes at most `timeout_s` in all, however slowly it drips."""
        async with asyncio.timeout(self._cfg.timeout_s), self._http.stream(method, path, content=body) as response:
            return Response(response.status_code, response.headers, await read_body(response))

    def _read(self, body: bytes) -> Completion:
        try:
            answer = json.loads(body)
            choice, usage = answer["choices"][0], answer.get("usage")
            content = choice["message"].get("content") or ""
            if isinstance(content, list):  # parts, as in requests
                content = "".join(part["text"] for part in content if part.get("type") == "text")
            usage = usage if isinstance(usage, dict) else {}
            return Completion(
                text=self.masked(content.encode(errors="replace").decode()),  # half a surrogate pair can't be stored
                finish="length" if choice.get("finish_reason") == "length" else "stop",
                prompt_tokens=whole(usage.get("prompt_tokens")),
                completion_tokens=whole(usage.get("completion_tokens")),
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Unreadable(body) from error

    # ---- what went wrong -------------------------------------------------------------------------------------------
    def _may_pass(self, failure: Failure) -> bool:
        """Is it worth another try?"""
        if isinstance(failure, Response):
            lost = failure.status == 404 and self._last_answer is not None  # by a gateway, while its server restarts
            passing = failure.status in (408, 409, 429) or failure.status >= 500 or lost
            return passing and b"insufficient_quota" not in failure.body
        return "CERTIFICATE_VERIFY_FAILED" not in reason(failure)

    def _is_away(self, failure: Failure, failing: float) -> bool:
        """Has the server gone, having answered once? Not if it answers others while a request is `failing`."""
        gone = isinstance(failure, httpx2.ConnectError)
        gone = gone or (isinstance(failure, Response) and failure.status in (404, 502, 503, 504))
        return gone and self._last_answer is not None and self._last_answer < failing

    def _gave_up(self, path: str, failure: Failure, tries: int, wait: float) -> Unavailable | Failing:
        place, again = self._cfg.place, f"Then {self._again}"
        match failure:
            case Response():
                busy = f", or lower {place}.concurrency" if path == CHAT else ""
                fix = f"wait for {wait:.0f} s" if wait > PATIENCE_S else f"see its log{busy}"
                error = self._error(path, f"status {failure.status}, {tries} times", f"{fix}. {again}", failure.body)
                passing = wait > PATIENCE_S or failure.status in (408, 409, 429)
                return Unavailable(error) if passing else Failing(error)
            case Unreadable():
                fix = failure.fix or f"is {place}.url the part before /{CHAT} of an OpenAI-compatible server?"
                what = "chat completion" if path == CHAT else "answer"
                return Failing(self._error(path, f"{tries} times, what came back is no {what}", fix, failure.body))
            case TimeoutError():
                fix = f"raise {place}.timeout_s or lower {place}.concurrency"
                return Failing(
                    self._error(path, f"no answer within {self._cfg.timeout_s:g} s, {tries} times", f"{fix}. {again}")
                )
        fix = f"is the server running there, and is {place}.url right? {again}"
        error = self._error(path, f"can't be reached ({self._quoted(reason(failure))}), {tries} times", fix)
        return Unavailable(error) if isinstance(failure, httpx2.ConnectError) else Failing(error)

    @property
    def _again(self) -> str:
        kept = ": what was answered is kept" if isinstance(self._cfg, RemoteConfig) else ""
        return f"give the same command again{kept}"

    async def _refused(self, path: str, failure: Failure, request: Mapping[str, Any]) -> ModelError:
        if isinstance(failure, Response):
            fix = await self._fix(failure, request)
            kind = UnknownModel if knows_no_model(failure, request) else ModelError
            return kind(self._error(path, f"status {failure.status}", fix, failure.body))
        fix = "have $SSL_CERT_FILE name a file of the certificates that sign the server's own"
        return ModelError(self._error(path, f"can't be reached ({self._quoted(reason(failure))})", fix))

    async def _fix(self, said: Response, request: Mapping[str, Any]) -> str:
        """How to mend what the server refused."""
        cfg = self._cfg
        if 300 <= said.status < 400 and (elsewhere := said.headers.get("Location")):
            return f"it moved to {self._quoted(elsewhere)}: set {cfg.place}.url accordingly"
        if said.status == 402 or b"insufficient_quota" in said.body:
            return f"the account is used up: fill it, then {self._again}"
        if said.status in (401, 403) and cfg.auto:
            return f"the server of {cfg.server} has another key by now: give the same command again"
        if said.status in (401, 403):
            return f"${cfg.key_env} {'holds a key that is refused' if self._key else 'is empty'}: set it to a key"
        if not isinstance(cfg, RemoteConfig):
            return "see what it says, and its log"
        if said.status in (400, 422) and (name := field_named(said.body, request)):
            return how_to_leave_out(name, request, cfg.place)
        if said.status in (400, 404) and (models := await self._models()) and cfg.model not in models:
            known = ", ".join(models[:LISTED])
            return f"set {cfg.place}.model to one of {known}.{did_you_mean(cfg.model, models)}"
        if said.status in (404, 405):
            return f"{cfg.place}.url is the part before /{CHAT} and mostly ends in /v1: is it right?"
        return "the server can't serve this request, see what it says"

    async def _models(self) -> list[str]:
        """The models that the server lists, if it does."""
        try:
            said = await self._say("GET", "models")
            return [self._quoted(str(model["id"])) for model in json.loads(said.body)["data"]]
        except (Unreadable, TimeoutError, httpx2.RequestError, ValueError, LookupError, TypeError, RecursionError):
            return []

    def _error(self, path: str, what: str, fix: str, body: bytes = b"") -> str:
        said = self._quoted(body.decode(errors="replace"))
        return f"{self._address(path)}: {what}{f' ({said})' if said else ''}: {fix}"

    def _quoted(self, text: str) -> str:
        """What others said, for an error: short, and without the key or a part of it."""
        return " ".join(self.masked(text).split())[:QUOTED]

    def _address(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"

    def masked(self, text: str) -> str:
        """The text without the key."""
        if len(self._key) >= SHORTEST_KEY:
            for form in (self._key, quote(self._key, safe=""), quote(self._key)):
                text = text.replace(form, f"${self._cfg.key_env}")
        return text


async def all_at(concurrency: int, asking: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """What each comes to, in order, so many under way at once; after an error, the others are given up."""
    free = asyncio.Semaphore(concurrency)

    async def wait(one: Coroutine[Any, Any, Answer]) -> Answer:
        async with free:
            return await one

    waiting = list(asking)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait(one)) for one in waiting]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0]  # noqa: B904 - its context is the group
    finally:
        for one in waiting:
            one.close()  # those that were given up before their turn
    return [task.result() for task in tasks]


def give_up(loop: asyncio.Runner) -> None:
    """Cancel what another thread asks in that loop now: what comes later, such as a `close`, goes on."""
    for task in asyncio.all_tasks(loop.get_loop()):
        loop.get_loop().call_soon_threadsafe(task.cancel)


# ---- answers ---------------------------------------------------------------------------------------------------------
async def read_body(response: httpx2.Response) -> bytes:
    """The body, unpacked if it is packed in spite of what was asked; Unreadable if it is damaged or over LARGEST."""
    packed = response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None  # 32: gzip or zlib, as its header says
    body = bytearray()
    try:
        async for chunk in response.aiter_raw():
            body += unpacker.decompress(chunk, LARGEST + 1 - len(body)) if unpacker else chunk
            if len(body) > LARGEST:
                raise Unreadable(b"more than %d MB" % (LARGEST >> 20))
    except zlib.error as error:
        raise Unreadable(b"damaged gzip") from error
    return bytes(body)


def whole(count: Any) -> int:
    """A count of tokens; 0 for what can't be one."""
    return int(count) if type(count) in (int, float) and 0 <= count < 2**53 else 0


# ---- refusals --------------------------------------------------------------------------------------------------------
def knows_no_model(failure: Failure, request: Mapping[str, Any]) -> bool:
    """Does the server itself, and not a gateway, say that what the request names isn't there?"""
    model = request.get("model")
    return isinstance(failure, Response) and failure.status == 404 and bool(model) and model.encode() in failure.body


def field_named(body: bytes, request: Mapping[str, Any]) -> str | None:
    """The field of the request that a refusal names, if it names one that can be left out."""
    names = [name for name in request if name not in ("model", "messages")]
    try:
        named = json.loads(body)["error"]["param"]
        if named in names:
            return named
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    words = set(re.findall(r"\w+", body.decode(errors="replace")))
    return next((name for name in names if name in words), None)


def how_to_leave_out(name: str, request: Mapping[str, Any], place: str) -> str:
    if name == "max_tokens":
        new = f"max_tokens: null, max_completion_tokens: {request[name]}"
        return f"set '{place}.request={{{new}}}' for a model that has another name for it; else a smaller number"
    return f"set '{place}.request={{{name}: null}}', which leaves it out, or another value there"


def reason(error: BaseException | None) -> str:
    """What the system said of a connection, which stands at the bottom of several layers' errors."""
    said = ""
    while error is not None:
        said = str(error) or said
        if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError | socket.gaierror):
            said = os.strerror(error.errno)
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
    return said or "the connection broke"


# ---- tries -----------------------------------------------------------------------------------------------------------
def waiting_time(failure: Failure, tries: int) -> float:
    """Seconds until the next try: what the server asks for, else doubling, with jitter so that requests spread."""
    asked = retry_after(failure.headers.get("Retry-After", "")) if isinstance(failure, Response) else 0.0
    return asked or random.uniform(0.5, 1.0) * min(FIRST_WAIT_S * 2 ** min(tries - 1, 10), LONGEST_WAIT_S)


def retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, which holds seconds or a date; 0 without a sound one."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return 0.0


def on_this_machine(url: str) -> bool:
    """Is it a plain address of this machine: its loopback, its name, or a number of its own?"""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http":  # its certificates may be named by the environment
        return False
    if host in ("localhost", socket.gethostname().lower()):
        return True
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # what isn't ours can't be bound
    except (ValueError, OSError):
        return False
    return True
