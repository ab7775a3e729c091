"""Starts a zygote in the strongest isolation that there is, asks it for sessions' processes, and ends both."""

import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from vlm_agents.errors import ConfigError, EnvError
from vlm_agents.sandbox.confinement import DEVICES, LIBRARIES, NOBODY
from vlm_agents.sandbox.settings import Isolation, SandboxSettings
from vlm_agents.sandbox.zygote import remove

logger = logging.getLogger(__name__)

PRIVATE = "/sandbox"  # a session's folder within bubblewrap
END_S = 10.0  # until a killed process must be gone
_FOLDERS = "vlm_agents_sandbox_"
_MAIN = "import sys; sys.path[:] = {path!r}; from vlm_agents.sandbox.zygote import main; main(sys.argv[1])"


class Zygote:
    """A running zygote; see `vlm_agents.sandbox.zygote`."""

    def __init__(self, settings: SandboxSettings) -> None:
        """Start one. ConfigError where no isolation that the settings accept can be had."""
        refusals = []
        for isolation in settings.accepted:
            refused = self._start(settings, isolation)
            if not refused:
                self.isolation: Isolation = isolation
                logger.debug("sandbox: %s; preloaded: %s", isolation, ", ".join(self.preloaded))
                return
            refusals.append(f"{isolation}: {refused}")
        raise ConfigError(
            f"env.sandbox.require={settings.require} can't be met on this machine. {'; '.join(refusals)}. "
            "Install bubblewrap, allow user namespaces or use a kernel with Landlock (5.13 or later); "
            "env.sandbox.require=any goes without, which confines no files and, without seccomp, no network"
        )

    def _start(self, settings: SandboxSettings, isolation: Isolation) -> str:
        """Start a process with this isolation; why it can't be had, or an empty string."""
        if isolation == "bubblewrap" and not shutil.which("bwrap"):
            return "there is no command bwrap"
        self._folder = "" if isolation == "bubblewrap" else tempfile.mkdtemp(prefix=_FOLDERS)
        self.control, theirs = socket.socketpair()
        try:
            parent = os.pidfd_open(os.getpid())
        except (AttributeError, OSError):  # not Linux, or before 5.3: the closed socket must do
            parent = None
        source = str(Path(__file__).resolve().parents[2])
        package = [f"{source}/vlm_agents/{part}" for part in ("__init__.py", "errors.py", "sandbox")]
        installed = [os.path.realpath(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        standard = [os.path.realpath(p) for p in sys.path if p.startswith(sys.base_prefix) and p not in installed]
        readable = _outermost([os.path.realpath(sys.base_prefix), *installed, *filter(os.path.exists, LIBRARIES)])
        asked = {
            "isolation": isolation,
            "settings": dataclasses.asdict(settings),
            "readable": readable,
            "package": package,
            "source": source,
            "folder": self._folder or PRIVATE,
            "control": theirs.fileno(),
            "parent": parent,
        }
        main = _MAIN.format(path=[*dict.fromkeys([*standard, *installed]), source])
        command = [os.path.realpath(sys.executable), "-sSPB", "-c", main, json.dumps(asked)]
        if isolation == "bubblewrap":
            command = [*_bubblewrap([*readable, *package]), *command]
        passed = [theirs.fileno()] if parent is None else [theirs.fileno(), parent]
        with tempfile.TemporaryFile() as words:
            self._process = subprocess.Popen(
                command,
                pass_fds=passed,
                env=_environment(self._folder or PRIVATE),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                start_new_session=True,
            )
            theirs.close()
            if parent is not None:
                os.close(parent)
            answer = self._first_answer(settings.start_s)
            if "ready" in answer:
                self.preloaded: list[str] = answer["ready"]
                return ""
            self.close()
            words.seek(0)
            last = words.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        return answer.get("refused") or " ".join(last) or f"its process didn't begin within {settings.start_s:g} s"

    def _first_answer(self, timeout_s: float) -> dict:
        self.control.settimeout(timeout_s)
        line = b""
        with suppress(OSError):
            while not line.endswith(b"\n"):
                got = self.control.recv(65536)
                if not got:
                    break
                line += got
        self.control.settimeout(END_S)
        return json.loads(line) if line.endswith(b"\n") else {}

    def fork(self) -> "tuple[socket.socket, socket.socket]":
        """Have a session's process forked: its channel and its lifeline. EnvError where the zygote is gone."""
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        try:
            socket.send_fds(self.control, [b"f"], [end.fileno() for end in theirs])
        except OSError as error:
            for end in ours:
                end.close()
            raise EnvError(f"the sandbox's process is gone: {error}") from error
        finally:
            for end in theirs:
                end.close()
        return ours

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it and its sessions, and remove their folders."""
        with suppress(OSError), self.control:
            self.control.shutdown(socket.SHUT_RDWR)  # a process that was forked from this one may have it open too
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._folder:
            remove(self._folder)

    def disown(self) -> None:
        """In a process that was forked from the one that started it: it is that one's to end."""
        self.control.close()
        self._process.returncode = 0  # not ours to wait for


def end(lifeline: socket.socket) -> str:
    """Kill a session's process, if it lives, and wait until it is gone: its exit status, the limit that it broke, or an
    empty string where its zygote went with it."""
    with lifeline, suppress(OSError):
        lifeline.settimeout(END_S)
        with suppress(OSError):
            lifeline.send(b"k")
        return lifeline.recv(64).decode()
    return ""


def _outermost(paths: list[str]) -> list[str]:
    """The paths that don't lie in another of them; links stay."""
    return [p for p in dict.fromkeys(paths) if not any(p != q and p.startswith(f"{q}/") for q in paths)]


def _environment(folder: str) -> dict[str, str]:
    """All that a session finds in its environment: nothing of ours."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"HOME": folder, "TMPDIR": folder, "MPLCONFIGDIR": f"{folder}/matplotlib", "MPLBACKEND": "Agg"}
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | threads | own


def _bubblewrap(readable: list[str]) -> list[str]:
    """The command before the command: nothing of the machine but these paths, no network, no privilege."""
    words = ["bwrap", "--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    words += ["--hostname", "sandbox", "--cap-drop", "ALL", "--new-session", "--proc", "/proc"]
    for path in readable:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    words += ["--tmpfs", PRIVATE]
    if not any(path.startswith("/tmp/") for path in readable):
        words += ["--symlink", PRIVATE, "/tmp"]
    return [*words, "--remount-ro", "/", "--chdir", PRIVATE, "--"]
