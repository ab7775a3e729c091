"""Landlock: which files a process can open, and whom it can reach. Needs no privilege and can't be taken off again.

It doesn't see stat, chdir, chmod or a change of times: see `seccomp` and docs/sandbox.md.
"""

import os
import struct
from collections.abc import Iterable

from vlm_agents.sandbox import syscalls

WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR = 1 << 1, 1 << 2, 1 << 3, 1 << 4
# Not to be made, nor executed: devices, sockets, FIFOs.
WRITE = sum(
    1 << bit for bit in (1, 4, 5, 7, 8, 12, 13, 14)
)  # write; remove folder, file; make folder, file, symlink...
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights on files that a version of Landlock knows; 16 from version 5 on


def version() -> int:
    """Landlock's version in this kernel; 0 where it has none."""
    try:
        return syscalls.call("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str], emptied: Iterable[str] = ()) -> None:
    """From here on this process opens nothing but what is, or lies under, these paths; OSError where it can't be had.

    From those that are `emptied` it can remove folders, and no more.

    Also, where the kernel knows how: no TCP, no signal to and no abstract socket of a process outside.
    """
    known = version()
    if not known:
        raise OSError("this kernel has no Landlock")
    handled = (1 << _RIGHTS.get(known, 16)) - 1
    network = 3 if known >= 4 else 0  # bind, connect
    scopes = 3 if known >= 6 else 0  # abstract sockets, signals
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    rules = syscalls.call("landlock_create_ruleset", struct.pack("=QQQ", handled, network, scopes), size, 0)
    read = READ_FILE | READ_DIR
    for paths, rights in ((readable, read), (writable, read | WRITE), (emptied, REMOVE_DIR)):
        for path in filter(os.path.exists, paths):
            allowed = rights & handled
            if not os.path.isdir(path):
                allowed &= READ_FILE | WRITE_FILE
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            syscalls.call("landlock_add_rule", rules, 1, struct.pack("=Qi", allowed, beneath), 0)
            os.close(beneath)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.call("landlock_restrict_self", rules, 0)
    os.close(rules)
