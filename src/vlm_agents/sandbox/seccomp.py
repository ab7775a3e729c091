"""A filter of system calls: those that Python and its picture libraries need are allowed, all others fail with EPERM.

So there is no other process or thread, no socket, no signal to anybody else, no namespace, mount, key ring, io_uring,
BPF, tracing or shared memory, whatever the kernel learns next. A filter can't be taken off again.
"""

import ctypes
import errno
import struct

from vlm_agents.sandbox import syscalls

ALLOWED = """
access alarm brk chdir clock_getres clock_gettime clock_nanosleep close close_range copy_file_range dup dup2 dup3 exit
exit_group faccessat faccessat2 fadvise64 fchdir fdatasync fstat fstatfs fsync ftruncate futex getcpu getcwd getdents64
getegid geteuid getgid getgroups getitimer getpgid getpgrp getpid getppid getrandom getresgid getresuid getrlimit
getrusage getsid gettid gettimeofday getuid lseek lstat madvise mincore mkdir mkdirat mmap mprotect mremap munmap
nanosleep newfstatat open openat pause pipe pipe2 poll ppoll pread64 pselect6 pwrite64 read readlink readlinkat readv
rename renameat renameat2 restart_syscall rmdir rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn sched_getaffinity
sched_yield select sendfile setitimer sigaltstack stat statfs statx symlink symlinkat sysinfo time times umask uname
unlink unlinkat wait4 waitid write writev
""".split()
# They seem to succeed and do nothing: shutil.copy calls them, and Landlock doesn't see them.
PRETENDED = "chmod fchmod fchmodat fchmodat2 futimesat utime utimensat utimes".split()

_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # copies, flags and locks; not F_SETOWN, by which others get signals
_IOCTL = (0x5401, 0x5413, 0x5450, 0x5451, 0x541B)  # is it a terminal, its size, close-on-exec, bytes to read

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
    for names, verdict in ((ALLOWED, _ALLOW), (PRETENDED, _ERRNO)):
        for number in filter(None.__ne__, map(syscalls.number, names)):
            ops += [_op(_JUMP_IF_EQUAL, number, 0, 1), _op(_RETURN, verdict)]
    # Only their lower halves count: the kernel takes these arguments as 32 bits.
    conditions = {"fcntl": (1, _FCNTL), "ioctl": (1, _IOCTL), "prlimit64": (0, (0,)), "kill": (0, (pid,))}
    for name, (argument, values) in (conditions | {"tgkill": (0, (pid,))}).items():
        body = [_op(_LOAD, _ARGUMENTS + 8 * argument)]
        for value in values:
            body += [_op(_JUMP_IF_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW)]
        body.append(refused)
        ops += [_op(_JUMP_IF_EQUAL, syscalls.number(name) or 0, 0, len(body)), *body]
    return b"".join([*ops, refused])


def install(pid: int) -> None:
    """Filter the calls of this process from here on, `pid` its own; OSError where the kernel can't."""
    if syscalls.AUDIT_ARCH is None:
        raise OSError(f"the system calls of this machine ({syscalls.MACHINE or 'not Linux'}) are not known")
    code = program(pid)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.call("seccomp", 1, 0, pointer)  # SECCOMP_SET_MODE_FILTER
