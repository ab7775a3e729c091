"""System calls that Python has no function for, by ctypes.

Numbers are the kernel's: arch/x86/entry/syscalls/syscall_64.tbl, and include/uapi/asm-generic/unistd.h for aarch64.
"""

import ctypes
import os
import platform
import sys

MACHINE = platform.machine() if sys.platform == "linux" and sys.maxsize > 2**32 else ""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(MACHINE)  # None: a machine that we don't know

# On x86_64, and on aarch64.
_OWN: dict[str, tuple[int, int]] = {
    "capset": (126, 91),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "mount": (165, 40),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "unshare": (272, 97),
}

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
CAPABILITY_VERSION_3 = 0x20080522


def number(on_machines: tuple[int, int | None]) -> int | None:
    """Which of these numbers, on x86_64 and on aarch64, is this machine's; None where it has no such call."""
    return on_machines[1 if MACHINE == "aarch64" else 0]


def call(name: str, *arguments: int | bytes | ctypes.Array | None) -> int:
    """Make a system call; OSError where it fails, or on a machine whose numbers aren't known."""
    if AUDIT_ARCH is None:
        raise OSError(f"{name}: the system calls of this machine ({MACHINE or 'not 64-bit Linux'}) are not known")
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number(_OWN[name]) or 0), *words, *[ctypes.c_long(0)] * (6 - len(words)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def prctl(option: int, value: int) -> None:
    call("prctl", option, value)


def drop_capabilities() -> None:
    """Give up what a privileged user may do; with no_new_privs there is no way back."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
