"""What others have code run by: a sandbox, its sessions, and what comes of a turn."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from PIL import Image

from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.sandbox import wire
from vlm_agents.sandbox.launcher import Zygote, end
from vlm_agents.sandbox.notebook import opaque
from vlm_agents.sandbox.settings import Isolation, SandboxSettings

Ended = Literal["done", "error", "timeout", "cpu", "tmp", "died"]
BIRTH_S = 30.0  # until a forked process must have said that it is confined


@dataclass(frozen=True)
class Result:
    """What came of a turn: what the code printed and showed, in its order, pictures in RGB.

    `ended`: done; error: the code raised; timeout: it ran too long; cpu, tmp: its process went over that limit; died:
    its process ended, or talked nonsense. After the last four the process is a new one, with the session's pictures and
    without its variables, and `error` says so in words for a model.
    """

    parts: tuple[str | Image.Image, ...]
    error: str | None
    ended: Ended
    seconds: float  # wall time, without a start of the process
    isolated: Isolation

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if isinstance(part, Image.Image)]


class Sandbox:
    """Sessions that share limits and the process that they are forked from. Any thread may open one.

    Started when first needed, and again when its process is gone. In another process, forked or sent a pickle of it, it
    is another sandbox with the same settings.
    """

    def __init__(self, settings: SandboxSettings = SandboxSettings()) -> None:  # noqa: B008 (it is frozen)
        self.settings = settings
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type["Sandbox"], tuple[SandboxSettings]]:
        return Sandbox, (self.settings,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def isolated(self) -> Isolation:
        """What keeps sessions away from the machine. ConfigError where nothing does that the settings accept."""
        return self._running().isolation

    def open(self, pictures: Mapping[str, Image.Image] | None = None) -> "Session":
        """A session in which these names are bound to these pictures, converted to RGB."""
        session = Session(self)
        session.bind(pictures or {})
        return session

    def close(self) -> None:
        """End it and every session's process."""
        with self._lock:
            if self._zygote is not None and self._owner == os.getpid():
                self._zygote.close()
            self._zygote = None

    def _running(self) -> Zygote:
        with self._lock:
            if self._owner != os.getpid():
                if self._zygote is not None:
                    self._zygote.disown()
                self._zygote, self._owner = None, os.getpid()
            if self._zygote is not None and not self._zygote.alive:
                self._zygote.close()
                self._zygote = None
            if self._zygote is None:
                self._zygote = Zygote(self.settings)
            return self._zygote

    def _fork(self) -> "_Process":
        """A new confined process. EnvError where there is none to be had, at a second attempt neither."""
        try:
            return _Process(self._running())
        except EnvError:
            return _Process(self._running())


class Session:
    """One trajectory's Python: variables live from turn to turn. For one thread at a time."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._process: _Process | None = None
        self._pictures: dict[str, Image.Image] = {}
        self._unsent: set[str] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def bind(self, pictures: Mapping[str, Image.Image]) -> None:
        """Bind names to pictures, from the next turn on and after each restart."""
        for name, picture in pictures.items():
            if not name.isidentifier():
                raise ConfigError(f"a picture can't be called {name!r}: it must be a name of Python")
            self._pictures[name] = opaque(picture)
        self._unsent |= pictures.keys()

    def run(self, code: str) -> Result:
        """Run code as the next cell. EnvError where no process can be had; whatever the code does is in the result."""
        if self._closed:
            raise EnvError("this session is closed")
        if self._process is None:
            self._process, self._unsent = self._sandbox._fork(), set(self._pictures)
        process, settings, began = self._process, self._sandbox.settings, time.monotonic()
        sent = {name: self._pictures[name] for name in sorted(self._unsent)}
        self._unsent = set()
        try:
            parts, error = process.ask(code, sent, began + settings.turn_s, settings)
            ended: Ended = "error" if error is not None else "done"
        except TimeoutError:
            why = f"TimeoutError: the code ran for more than {settings.turn_s:g} s and was ended."
            parts, ended, error = (), "timeout", self._told_of_restart(why)
        except (OSError, EOFError, wire.BrokenMessage) as broken:
            ended, why = _cause(process.close(), broken, settings)
            parts, error = (), self._told_of_restart(why)
        return Result(parts, error, ended, time.monotonic() - began, process.isolation)

    def close(self) -> None:
        """End the session's process."""
        if self._process is not None:
            self._process.close()
        self._process, self._closed = None, True

    def _told_of_restart(self, why: str) -> str:
        if self._process is not None:
            self._process.close()
        self._process = None
        names = ", ".join(self._pictures)
        bound = f" These pictures are bound again: {names}." if names else ""
        return f"{why} Python was started anew, all variables are lost.{bound}"


def _cause(status: str, broken: Exception, settings: SandboxSettings) -> tuple[Ended, str]:
    """Why a process ended, from what its zygote said of it."""
    if status == "-24":  # SIGXCPU
        return "cpu", f"The process used its {settings.cpu_s} s of CPU time and was ended."
    if status == "tmp":
        limits = f"{settings.tmp_mib} MiB or {settings.tmp_files} files"
        return "tmp", f"The process wrote more than {limits} and was ended."
    if isinstance(broken, wire.BrokenMessage) or not status:
        return "died", "The process was ended: it gave no proper answer."
    return "died", f"The process ended ({'signal ' + status[1:] if status[0] == '-' else 'exit status ' + status})."


class _Process:
    """A session's process, as seen from here."""

    def __init__(self, zygote: Zygote) -> None:
        self.isolation: Isolation = zygote.isolation
        self._channel, self._lifeline = zygote.fork()
        self._owner = os.getpid()
        self._deadline = time.monotonic() + BIRTH_S
        try:
            said = wire.header(self._read, 4096)
        except (OSError, EOFError, wire.BrokenMessage) as error:
            raise EnvError(f"the sandbox couldn't start a process ({self.close() or error})") from error
        if said.get("confined") != self.isolation:
            self.close()
            raise EnvError(f"a process of the sandbox couldn't be confined: {said.get('refused')}")

    def ask(
        self, code: str, pictures: Mapping[str, Image.Image], deadline: float, settings: SandboxSettings
    ) -> tuple[tuple[str | Image.Image, ...], str | None]:
        """Have code run. TimeoutError after the deadline; EOFError, OSError or BrokenMessage where the process ended or
        said what is no answer to this very request."""
        self._deadline = deadline
        self._expect_silence()
        request = secrets.token_hex(16)  # not to be guessed, so that no answer is prepared or left over
        names = [[name, *picture.size] for name, picture in pictures.items()]
        header = {"id": request, "code": code, "pictures": names}
        for piece in wire.packed(header, (picture.tobytes() for picture in pictures.values())):
            self._channel.settimeout(self._left_s())
            self._channel.sendall(piece)
        # A character is at most 12 bytes of JSON, a pair of escaped surrogates; some text is notes and the traceback.
        most_chars = 2 * settings.output_chars + 200 * (settings.pictures + 2)
        answer = wire.header(self._read, 12 * most_chars + 4096)
        if answer.get("id") != request:
            raise wire.BrokenMessage("an answer to another request")
        shown, error = answer.get("parts"), answer.get("error")
        if not isinstance(shown, list) or len(shown) > 2 * settings.pictures + 2:
            raise wire.BrokenMessage("no list of parts, or too many")
        if not (error is None or isinstance(error, str)) or len(error or "") > most_chars:
            raise wire.BrokenMessage("no proper error")
        if sum(not isinstance(part, str) for part in shown) > settings.pictures:
            raise wire.BrokenMessage("too many pictures")
        parts = tuple(self._part(part, settings.picture_pixels) for part in shown)
        return parts, None if error is None else _proper(error)

    def close(self) -> str:
        """Kill it, if it lives: see `launcher.end`."""
        self._channel.close()
        if self._lifeline.fileno() < 0 or self._owner != os.getpid():
            return ""
        return end(self._lifeline)

    def _expect_silence(self) -> None:
        """Nothing is said without being asked."""
        self._channel.setblocking(False)
        try:
            unasked = self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if unasked:
            raise wire.BrokenMessage("words that nobody asked for")
        raise EOFError

    def _part(self, part: Any, most_pixels: int) -> str | Image.Image:
        if isinstance(part, str):
            return _proper(part)
        if not (isinstance(part, list) and len(part) == 2 and all(type(side) is int and side > 0 for side in part)):
            raise wire.BrokenMessage("a part that is neither text nor a size")
        width, height = part
        if width * height > most_pixels:
            raise wire.BrokenMessage(f"a picture of {width}x{height} pixels")
        return Image.frombytes("RGB", (width, height), self._read(3 * width * height))

    def _read(self, count: int) -> bytearray:
        def receive(view: memoryview) -> int:
            self._channel.settimeout(self._left_s())
            return self._channel.recv_into(view)

        return wire.filled(count, receive)

    def _left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _proper(text: str) -> str:
    """Without halves of surrogate pairs, which no UTF-8 has."""
    return text.encode("utf-8", "replace").decode()
