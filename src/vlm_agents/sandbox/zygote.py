"""The process that imports the picture libraries once and forks sessions. It never sees their code or pictures.

Who started it sends, over a socket, two ends of pairs for each session: the session's channel and its lifeline. A
session is killed when its lifeline says so or is closed, all of them when the control socket is closed or the process
that started the zygote is gone; what became of a session is told on its lifeline, after its folder is removed.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass

from vlm_agents.sandbox import child, landlock
from vlm_agents.sandbox.confinement import DEVICES, NOBODY, Ground, trial
from vlm_agents.sandbox.settings import SandboxSettings

_PILLOW = ("Image", "ImageChops", "ImageColor", "ImageDraw", "ImageEnhance", "ImageFilter", "ImageFont", "ImageOps")
_SKIMAGE = ("color", "exposure", "feature", "filters", "measure", "morphology", "segmentation", "transform")
PRELOADED = ("numpy", "matplotlib.pyplot", "matplotlib.patches", "scipy.ndimage")
PRELOADED += tuple(f"PIL.{part}" for part in _PILLOW) + tuple(f"skimage.{part}" for part in _SKIMAGE)
LOOK_S = 0.1  # between two looks at the folders of sessions, where the kernel doesn't limit them


@dataclass
class Session:
    lifeline: socket.socket
    folder: str
    over: str = ""  # which limit it broke


def main(arguments: str) -> None:
    """Serve until the control socket is closed. `arguments`: JSON, see `launcher`."""
    asked = json.loads(arguments)
    settings = SandboxSettings(**asked["settings"])
    ground = Ground(asked["isolation"], settings, tuple(asked["readable"]), asked["folder"])
    control = socket.socket(fileno=asked["control"])
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel ends a session before the run
    try:
        if refused := _refusal(ground):
            _say(control, {"refused": refused})
            return
        loaded, taken_bytes = _loaded(ground, asked["package"])
        sys.path.remove(asked["source"])
        _say(control, {"ready": loaded})
        Zygote(ground, control, asked["parent"], taken_bytes + (settings.memory_mib << 20)).serve()
    except ConnectionError:
        pass  # nobody waits for us any more
    finally:
        remove(ground.folder, keep=ground.isolation == "bubblewrap")


def _loaded(ground: Ground, package: list[str]) -> tuple[list[str], int]:
    """Import the libraries: their names, and how much address space they take."""
    with open("/proc/self/statm") as statm:
        if ground.isolation == "landlock":  # sees what sessions see: the same fonts, and nothing to hand on
            readable = [*ground.readable, *package, *DEVICES]
            landlock.restrict(readable, [ground.folder, "/dev/null"], [os.path.dirname(ground.folder)])
        loaded = _preload()
        statm.seek(0)
        return loaded, int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _say(control: socket.socket, message: dict[str, object]) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


def _refusal(ground: Ground) -> str:
    """Why sessions can't be confined here; an empty string where a trial one could."""
    folder = _own_folder(ground, "trial")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, trial(ground, folder).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as answer:
        refused = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ground.isolation != "bubblewrap":
        remove(folder)
    return refused or (f"a trial ended with {status}" if status else "")


def _own_folder(ground: Ground, name: str) -> str:
    if ground.isolation == "bubblewrap":
        return ground.folder
    folder = os.path.join(ground.folder, name)
    os.mkdir(folder, 0o700)
    if ground.isolation == "rlimits" and os.geteuid() == 0:
        os.chmod(ground.folder, 0o711)
        os.chown(folder, NOBODY, NOBODY)
    return folder


def _preload() -> list[str]:
    """Import what is there of the libraries, and have Pillow and matplotlib load what they put off."""
    loaded = []
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
            loaded.append(name)
    if "PIL.Image" in loaded:
        sys.modules["PIL.Image"].init()
    if plt := sys.modules.get("matplotlib.pyplot"):
        figure, axes = plt.subplots()
        axes.imshow([[0, 1]])
        axes.set_title("text")
        figure.canvas.draw()
        plt.close(figure)
    gc.collect()
    gc.freeze()  # what is shared with sessions stays so
    return loaded


class Zygote:
    def __init__(self, ground: Ground, control: socket.socket, parent: int | None, memory_bytes: int) -> None:
        self._ground, self._control, self._parent, self._memory = ground, control, parent, memory_bytes
        self._sessions: dict[int, Session] = {}
        self._count = 0
        self._woken, wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for pid in list(self._sessions):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _turn(self) -> bool:
        """Wait for something to do and do it; False when it is time to go."""
        lifelines = {session.lifeline.fileno(): pid for pid, session in self._sessions.items()}
        poll = select.poll()
        watched = [self._control.fileno(), self._woken, *lifelines]
        for descriptor in watched if self._parent is None else [*watched, self._parent]:
            poll.register(descriptor, select.POLLIN)
        looks = self._sessions and self._ground.isolation != "bubblewrap"
        ready = {descriptor for descriptor, _ in poll.poll(LOOK_S * 1000 if looks else None)}
        if self._parent in ready:
            return False
        for descriptor in ready & lifelines.keys():
            os.kill(lifelines[descriptor], signal.SIGKILL)  # not reaped yet, so nobody else has its number
        if looks:
            self._look()
        with suppress(BlockingIOError):
            os.read(self._woken, 4096)
        self._reap()
        return self._control.fileno() not in ready or self._fork()

    def _fork(self) -> bool:
        """Start a session for whoever asks; False when nobody will any more."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        except ConnectionError:
            return False
        if not message or len(descriptors) != 2:
            return False
        channel, lifeline = descriptors
        self._count += 1
        try:
            folder = _own_folder(self._ground, str(self._count))
            pid = os.fork()
        except OSError:  # no memory, no room: who asked sees both ends closed
            os.close(channel)
            os.close(lifeline)
            return True
        if not pid:
            _become_session(self._ground, folder, channel, self._memory)
        os.close(channel)
        self._sessions[pid] = Session(socket.socket(fileno=lifeline), folder)
        return True

    def _look(self) -> None:
        for pid, session in self._sessions.items():
            if not session.over and not within_limits(session.folder, self._ground.settings):
                session.over = "tmp"
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._sessions:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            session = self._sessions.pop(pid)
            if self._ground.isolation != "bubblewrap":
                remove(session.folder)
            with suppress(OSError):
                session.lifeline.send(session.over.encode() or b"%d" % os.waitstatus_to_exitcode(status))
            session.lifeline.close()


def _become_session(ground: Ground, folder: str, channel: int, memory_bytes: int) -> None:
    """In the forked process: keep the channel alone of all that the zygote has open, and live as a session."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.dup2(channel, child.CHANNEL) != child.CHANNEL:
            os._exit(1)
        os.closerange(child.CHANNEL + 1, 65536)
        for standard in (0, 1, 2):
            os.close(standard)
            os.open("/dev/null", os.O_RDWR)
        child.live(ground, folder, memory_bytes)
    finally:
        os._exit(1)


def within_limits(folder: str, settings: SandboxSettings) -> bool:
    """Does the folder hold no more than it may? Stops counting where it does."""
    files = size = 0
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files, size = files + 1, size + entry.stat(follow_symlinks=False).st_blocks * 512
                    if files > settings.tmp_files or size > settings.tmp_mib << 20:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError:
            return False  # too deep, or hidden from us
    return True


def remove(folder: str, keep: bool = False) -> None:
    """Remove a folder and all in it, however deep, with one descriptor and without following links; nobody else may be
    at work in it. `keep`: what is in it alone.
    """
    with suppress(OSError):
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        above: list[tuple[str, list[str]]] = []  # where we came from: what we entered, what is left beside it
        left = _emptied_of_files(here)
        while left or above:
            if left:
                name = left.pop()
                os.chmod(name, 0o700, dir_fd=here)
                there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                above.append((name, left))
                left = _emptied_of_files(there)
            else:
                there = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
                name, left = above.pop()
                os.rmdir(name, dir_fd=there)
            os.close(here)
            here = there
        os.close(here)
        if not keep:
            os.rmdir(folder)


def _emptied_of_files(folder: int) -> list[str]:
    """Remove what is no folder from this one, which is open; the names of the folders in it."""
    with os.scandir(folder) as entries:
        kinds = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in kinds:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in kinds if is_folder]
