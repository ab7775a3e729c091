"""A filter of system calls: those that Python and its picture libraries need are allowed, all others fail with EPERM.

So there is no other process or thread, no socket, no signal to anybody else, no namespace, mount, key ring, io_uring,
BPF, tracing or shared memory, whatever the kernel learns next. A filter can't be taken off again.
"""

import ctypes
import errno
import struct

from vlm_agents.sandbox import syscalls

Numbers = tuple[int, int | None]  # on x86_64; on aarch64, which lacks the older calls

ALLOWED: dict[str, Numbers] = {
    "access": (21, None),
    "alarm": (37, None),
    "brk": (12, 214),
    "chdir": (80, 49),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "close_range": (436, 436),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fadvise64": (221, 223),
    "fchdir": (81, 50),
    "fdatasync": (75, 83),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getgroups": (115, 158),
    "getitimer": (36, 102),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getresgid": (120, 150),
    "getresuid": (118, 148),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "getsid": (124, 156),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mincore": (27, 232),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "open": (2, None),
    "openat": (257, 56),
    "pause": (34, None),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "pwrite64": (18, 68),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "readv": (19, 65),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "restart_syscall": (219, 128),
    "rmdir": (84, None),
    "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "sendfile": (40, 71),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statfs": (137, 43),
    "statx": (332, 291),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "sysinfo": (99, 179),
    "time": (201, None),
    "times": (100, 153),
    "umask": (95, 166),
    "uname": (63, 160),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "write": (1, 64),
    "writev": (20, 66),
}
# They seem to succeed and do nothing: shutil.copy calls them, and Landlock doesn't see them.
PRETENDED: dict[str, Numbers] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "futimesat": (261, None),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}
# Allowed where an argument, the first of which is 0, has one of these values; OWN stands for this process.
OWN = -1
CONDITIONAL: dict[str, tuple[Numbers, int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # copies, flags, locks; no F_SETOWN: others get its signals
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x5450, 0x5451, 0x541B)),  # a terminal? its size; close-on-exec; bytes left
    "kill": ((62, 129), 0, (OWN,)),
    "prlimit64": ((302, 261), 0, (0,)),  # 0: itself
    "tgkill": ((234, 131), 0, (OWN,)),
}

_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _op(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, value)


def program(pid: int) -> bytes:
    """The filter of the process `pid`, in the kernel's classic BPF."""
    refused = _op(_RETURN, _ERRNO | errno.EPERM)
    ops = [_op(_LOAD, _ARCHITECTURE), _op(_JUMP_IF_EQUAL, syscalls.AUDIT_ARCH or 0, 1, 0), _op(_RETURN, _KILL_PROCESS)]
    ops.append(_op(_LOAD, _NUMBER))
    for calls, verdict in ((ALLOWED, _ALLOW), (PRETENDED, _ERRNO)):
        for on_machines in calls.values():
            if (number := syscalls.number(on_machines)) is not None:
                ops += [_op(_JUMP_IF_EQUAL, number, 0, 1), _op(_RETURN, verdict)]
    for on_machines, argument, values in CONDITIONAL.values():
        # The lower half alone counts: the kernel takes these arguments as 32 bits.
        body = [_op(_LOAD, _ARGUMENTS + 8 * argument)]
        for value in values:
            body += [_op(_JUMP_IF_EQUAL, pid if value == OWN else value, 0, 1), _op(_RETURN, _ALLOW)]
        ops += [_op(_JUMP_IF_EQUAL, syscalls.number(on_machines) or 0, 0, len(body) + 1), *body, refused]
    return b"".join([*ops, refused])


def install(pid: int) -> None:
    """Filter the calls of this process, whose id is `pid`, from here on. OSError where the kernel can't, or its calls
    aren't known."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    code = program(pid)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    syscalls.call("seccomp", 1, 0, pointer)  # SECCOMP_SET_MODE_FILTER
