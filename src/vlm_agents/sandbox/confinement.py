"""What a session's process gives up before it runs anything of an agent's; and the trial that it really has."""

import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_agents.sandbox import landlock, seccomp, syscalls
from vlm_agents.sandbox.settings import Isolation, SandboxSettings

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")  # of C, which Python's own are linked to
NOBODY = 65534
STACK = 8 << 20  # bytes


@dataclass(frozen=True)
class Ground:
    """Where sessions live: how they are kept apart, what they may read, and the folder that theirs is in or on."""

    isolation: Isolation
    settings: SandboxSettings
    readable: tuple[str, ...]  # the Python installation and the libraries
    folder: str  # a session's own with bubblewrap, where each mounts an empty one there; else what holds theirs


def confine(ground: Ground, folder: str, memory_bytes: int) -> None:
    """Confine this process, which has one thread, for good. `memory_bytes`: of address space, libraries included.

    Raises OSError where the kernel lacks what `ground.isolation` stands for.
    """
    _limit(ground.settings, memory_bytes)
    if ground.isolation == "bubblewrap":
        _own_namespaces(ground.settings, folder)
    if ground.isolation != "rlimits" and landlock.version():
        landlock.restrict([*ground.readable, *DEVICES], [folder, "/dev/null"])
    elif ground.isolation == "landlock":
        raise OSError("this kernel has no Landlock")
    if ground.isolation == "rlimits" and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.chdir(folder)
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # not before: a change of user takes it back
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # not to be traced by others of the same user
        syscalls.drop_capabilities()
        seccomp.install(os.getpid())
    except OSError:
        if ground.isolation != "rlimits":
            raise


def _limit(settings: SandboxSettings, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: settings.file_mib << 20,
        resource.RLIMIT_STACK: STACK,
        resource.RLIMIT_NPROC: 1,  # itself; doesn't hold for root, whom the filter holds
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (settings.cpu_s, settings.cpu_s + 1))  # SIGXCPU, then SIGKILL


def _own_namespaces(settings: SandboxSettings, folder: str) -> None:
    """Within bubblewrap's: an empty file system of limited size on `folder`, and nothing on /proc."""
    user, group = os.geteuid(), os.getegid()
    flags = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
    syscalls.call("unshare", flags)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    syscalls.call("mount", None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE, None)
    safe = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    size = f"size={settings.tmp_mib << 20},nr_inodes={settings.tmp_files + 1},mode=700".encode()  # 1: its root
    syscalls.call("mount", b"tmpfs", folder.encode(), b"tmpfs", safe, size)
    syscalls.call("mount", b"tmpfs", b"/proc", b"tmpfs", safe | syscalls.MS_RDONLY, b"size=4096,nr_inodes=1")


def trial(ground: Ground, folder: str) -> str:
    """Confine this process and try to get out: what went wrong, or an empty string where nothing did."""
    try:
        confine(ground, folder, 1 << 40)
        with open(os.path.join(folder, "trial"), "w") as file:
            file.write("private")
    except OSError as error:
        return str(error)
    if ground.isolation == "rlimits":
        return ""
    attempts: dict[str, Callable[[], Any]] = {
        "a process could be started": os.fork,
        "a socket could be made": socket.socket,
        "another process could be signalled": lambda: os.kill(os.getppid(), 0),
        "/etc/passwd could be read": lambda: open("/etc/passwd").close(),
        "/proc could be read": lambda: open("/proc/self/environ").close(),
        "the folder above the private one could be written": lambda: os.mkdir(f"{folder}.trial"),
    }
    for harm, attempt in attempts.items():
        try:
            made = attempt()
        except OSError:
            continue
        if made == 0 and attempt is os.fork:
            os._exit(0)
        return f"{harm}, though it should be confined"
    return ""
