"""Do programs that mean harm, or are broken, get out of the sandbox, or spoil a turn of anybody else?

Each of PROGRAMS runs in a session of its own and prints ESCAPED where it had its way; beside that it must end as it is
said to, in words that it is said to have. After each, another session's turn must come out right, the files, the
sockets, the processes and the memory that were its targets must be as they were, and nothing may be left running.

`--isolation landlock` does the same without bubblewrap. `--random 10000` draws programs that hide a secret of their own
session wherever they can, and hunt in the same places: a secret of another session in an answer is a leak.
"""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from PIL import Image

from vlm_agents.sandbox.session import Result, Sandbox, Session
from vlm_agents.sandbox.settings import Require, SandboxSettings

SETTINGS = SandboxSettings(
    turn_s=2.0,
    cpu_s=60,
    memory_mib=256,
    file_mib=4,
    tmp_mib=16,
    tmp_files=200,
    output_chars=2000,
    pictures=3,
    picture_pixels=250_000,
)
ESCAPED = "ESCAPED"
ERROR, ENDED = ("error",), ("died", "timeout", "cpu", "tmp")
DONE, ANY = ("done",), ("done", "error", *ENDED)


@dataclass(frozen=True)
class Program:
    """`says`: what must be found in its text or traceback, a regular expression."""

    name: str
    code: str
    ended: tuple[str, ...] = DONE
    says: str = ""
    again: str = ""  # run as the next turn; ESCAPED there counts too


# What a program may call: `tried(f, *arguments)` says ESCAPED unless f raises, `libc` is C's library.
TOOLS = '''
import ctypes, errno, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def tried(function, *arguments):
    try:
        value = function(*arguments)
    except BaseException as error:
        print("refused", type(error).__name__, getattr(error, "errno", ""))
    else:
        print("ESCAPED", repr(value)[:200])
def call(number, *arguments):
    """A raw system call; raises as Python's own do."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words, *[ctypes.c_long(0)] * (6 - len(words)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "call")
    return result
'''


def refused(name: str, *expressions: str) -> Program:
    """Each of these expressions must raise."""
    return Program(name, "\n".join(f"tried(lambda: {expression})" for expression in expressions), says="refused")


PROGRAMS = [
    # processes and threads
    refused("fork", "os.fork()"),
    Program("fork bomb", "while True:\n    os.fork()", ERROR, "Error"),
    Program(
        "fork bomb that goes on",
        "while True:\n    try:\n        if os.fork() >= 0: print('ESCAPED')\n    except OSError: pass",
        ("timeout",),
        "more than 2 s",
    ),
    refused("vfork by number", "call(58)"),
    refused("clone by number", "call(56, signal.SIGCHLD)"),
    refused("clone3", "call(435, bytes(88), 88)"),
    refused("a thread", "threading.Thread(target=print).start()"),
    Program(
        "threads left running",
        "def spin():\n    while True: time.sleep(0.01)\n"
        "for _ in range(100):\n    try:\n        threading.Thread(target=spin).start()\n        print('ESCAPED')\n"
        "    except RuntimeError: pass\nprint('none', threading.active_count())",
        says="none 1",
    ),
    refused("a daemon left behind", "subprocess.Popen(['/bin/sleep', '1000'], start_new_session=True)"),
    refused("double fork", "(os.fork() or os.setsid() or os.fork())"),
    refused("a shell", "subprocess.run('id', shell=True, check=True)"),
    Program("os.system", "print(os.system('id'))", says="-1|32512"),
    refused("execve", "os.execv(sys.executable or '/usr/bin/python3', ['python3', '-c', 'print(1)'])"),
    refused("posix_spawn", "os.posix_spawn('/bin/sh', ['sh'], {})"),
    refused("a pool of processes", "__import__('multiprocessing').Pool(2)"),
    # time
    Program("endless loop", "while True: pass", ("timeout",), "all variables are lost"),
    Program(
        "endless loop that catches all",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        ("timeout",),
    ),
    Program("endless loop in C", "sum(iter(int, 1))", ("timeout",)),
    Program("a huge power", "len(str(10 ** 10 ** 8))", ("timeout", "error")),
    Program("a regular expression without end", "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')", ("timeout",)),
    Program("sleep for ever", "time.sleep(10 ** 6)", ("timeout",)),
    Program("wait for input", "input()", ERROR, "EOFError"),
    Program("wait for a signal", "signal.pause()", ("timeout",)),
    Program(
        "deaf to all signals",
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        ("timeout",),
    ),
    Program("stops itself", "os.kill(os.getpid(), signal.SIGSTOP)", ("timeout",)),
    Program(
        "a timer that goes off after the turn",
        "signal.signal(signal.SIGALRM, lambda *_: os.write(3, b'x' * 100))\nsignal.setitimer(signal.ITIMER_REAL, 0.05)",
        again="time.sleep(0.2); print('fine')",
    ),
    # memory
    Program("memory bomb", "x = bytearray(1 << 30)", ERROR, "MemoryError"),
    Program("memory bomb in steps", "x = []\nwhile True: x.append(bytearray(1 << 20))", ERROR, "MemoryError"),
    Program("memory bomb of small things", "x = []\nwhile True: x = [x, x]", ("error", "died", "timeout")),
    Program("an array of ones", "np.ones((100_000, 100_000))", ERROR, "MemoryError"),
    Program("mmap", "import mmap; mmap.mmap(-1, 2 << 30)", ERROR, "Error"),
    refused("memfd", "os.memfd_create('x')"),
    refused("shared memory of System V", "call(29, 0, 1 << 20, 0o1600)"),
    refused("a message queue", "call(68, 0, 0o1600)", "call(240, b'queue', os.O_CREAT, 0o600, None)"),
    refused(
        "POSIX shared memory", "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory('x', True, 9)"
    ),
    refused("locked memory", "call(151, 3)"),
    Program(
        "raises its own limits",
        "import resource\n"
        "for n in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    tried(resource.setrlimit, n, (1 << 40, 1 << 40))",
        says="refused",
    ),
    refused("the limits of others", "__import__('resource').prlimit(@PARENT, 7, (3, 3))"),
    Program("deep recursion", "def f(): f()\nf()", ERROR, "RecursionError"),
    Program(
        "recursion without a limit",
        "sys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        ("died", "error"),
    ),
    Program("a deeply nested source", "eval('(' * 10000 + ')' * 10000)", ERROR),
    # output
    Program("endless print", "while True: print('x' * 1000)", ("timeout",)),
    Program("a long line", "print('x' * 10 ** 7)", says="output cut after 2000"),
    Program("a long value", "'x' * 10 ** 7", says="output cut after 2000"),
    Program("a long traceback", "raise ValueError('x' * 10 ** 7)", ERROR, r"\[\.\.\.\]"),
    Program("writes to the descriptors", "for d in (1, 2): os.write(d, b'ESCAPED')\nprint('ok')", says="ok"),
    Program("closed stdout", "sys.stdout.close(); os.close(1); os.close(2); print('still here')", says="still here"),
    Program("no stdout", "sys.stdout = None\nprint('lost')", again="print('back')"),
    Program("a stdout that raises", "sys.stdout = object()\nprint('lost')", ERROR, "AttributeError"),
    Program("halves of surrogate pairs", "print('\\ud83d', '\\x00', '\\x1b[2J', '\\udd11')"),
    Program("a repr that raises", "class A:\n    def __repr__(self): raise KeyError('no')\nA()", ERROR, "KeyError"),
    Program(
        "an exception that can't be told",
        "class E(Exception):\n    def __str__(self): raise E()\n    __repr__ = __str__\nraise E()",
        ERROR,
        "E",
    ),
    Program("raises BaseException", "class E(BaseException): pass\nraise E('out')", ERROR, "out"),
    # pictures
    Program("many pictures", "for _ in range(100): Image.new('RGB', (9, 9)).show()", says="further pictures left out"),
    Program("a huge picture", "Image.new('L', (10000, 10000)).show()", says="scaled from 10000x10000"),
    Program("a picture beyond memory", "Image.new('RGB', (60000, 60000)).show()", ERROR, "Memory|bomb|Error"),
    Program("a picture of nothing", "Image.new('RGB', (0, 5)).show()", ERROR, "can't be shown"),
    Program("a huge figure", "plt.figure(figsize=(5000, 5000)); plt.plot([1, 2]); plt.show()", says="scaled down"),
    Program("a figure at many dots", "plt.figure(dpi=100000); plt.plot([1, 2])", ANY),
    Program("many figures", "for _ in range(10): plt.figure(figsize=(1, 1))", says="further pictures left out"),
    Program(
        "a decompression bomb",
        "import struct, zlib\n"
        "def chunk(t, d): return struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))\n"
        "size = 50000\n"
        "data = zlib.compress(bytes(1 << 20) * 64)\n"
        "png = b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', size, size, 8, 0, 0, 0, 0))\n"
        "Image.open(io.BytesIO(png + chunk(b'IDAT', data) + chunk(b'IEND', b''))).show()",
        ERROR,
        "bomb|MemoryError",
    ),
    Program(
        "a bomb of zlib",
        "import zlib\nx = zlib.compress(bytes(1 << 24) * 2)\ny = [zlib.decompress(x) for _ in range(1000)]",
        ("error", "timeout"),
        "MemoryError|TimeoutError",
    ),
    Program(
        "a picture that lies about its size",
        "class Lie(Image.Image):\n    size = (1, 1)\n"
        "p = Lie(); p.__dict__.update(Image.new('RGB', (64, 64)).__dict__)\np.show()",
        ANY,
    ),
    # files
    *[
        refused(f"reads {path}", f"open({path!r}).read()", f"os.listdir({os.path.dirname(path)!r})")
        for path in (
            "/etc/passwd",
            "/etc/shadow",
            "/root/.bash_history",
            "/home/x",
            "/var/log/x",
            "/dev/mem",
            "/dev/sda",
        )
    ],
    refused("reads the target's file", "open('@SECRET').read()", "os.listdir('@FOLDER')", "open('@PACKAGE').read()"),
    refused("writes the target's file", "open('@SECRET', 'w')", "open('@SECRET', 'a')", "os.truncate('@SECRET', 0)"),
    refused("removes the target's file", "os.unlink('@SECRET')", "os.rename('@SECRET', 'x')", "os.rmdir('@FOLDER')"),
    refused("new files beside it", "open('@FOLDER/x', 'w')", "os.mkdir('@FOLDER/x')", "os.symlink('a', '@FOLDER/x')"),
    Program("changes the target's mode", "try: os.chmod('@SECRET', 0)\nexcept OSError: pass"),
    Program("changes the target's times", "try: os.utime('@SECRET', (0, 0))\nexcept OSError: pass"),
    refused("changes the target's owner", "os.chown('@SECRET', 1, 1)"),
    refused("sets an attribute", "os.setxattr('@SECRET', 'user.x', b'1')"),
    refused(
        "writes into the installation",
        "open(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w')",
        "open(os.__file__, 'r+')",
        "os.unlink(np.__file__)",
        "open('/usr/lib/x', 'w')",
        "open('/x', 'w')",
        "open('../x', 'w')",
    ),
    Program(
        "a link to the target",
        "os.symlink('@SECRET', 'link'); os.symlink('/', 'root')\n"
        "tried(lambda: open('link').read()); tried(lambda: open('link', 'w')); tried(lambda: os.listdir('root/etc'))\n"
        "tried(lambda: open('root@SECRET').read())",
        says="refused",
    ),
    refused("a hard link", "os.link('@SECRET', 'hard')"),
    refused("up and up", "open('../' * 40 + '@SECRET'[1:]).read()"),
    refused("a handle of a file", "call(304, 0, bytes(128), 0)"),
    Program(
        "fills the folder with one file", "open('x', 'wb').write(bytes(1 << 26))", ERROR, "Errno 27|too large|Errno 28"
    ),
    Program(
        "fills the folder with files",
        "n = 0\nwhile n < 1000:\n"
        "    open(f'f{n}', 'wb').write(bytes(1 << 20)); n += 1\n    time.sleep(0.01)\nprint('ESCAPED')",
        ("error", "tmp"),
        "Errno 28|wrote more than",
    ),
    Program(
        "fills the folder with names",
        "n = 0\nwhile n < 10 ** 5:\n    open(f'f{n}', 'w').close(); n += 1\n    time.sleep(0.001)\nprint('ESCAPED')",
        ("error", "tmp"),
        "Errno 28|wrote more than",
    ),
    Program(
        "a deep tree",
        "for n in range(10 ** 5):\n    os.mkdir('d'); os.chdir('d')\n    time.sleep(0.001)\nprint('ESCAPED')",
        ("error", "tmp"),
        "Errno 28|wrote more than",
    ),
    Program("many descriptors", "x = [open('/dev/null') for _ in range(10 ** 4)]", ERROR, "Too many open files"),
    Program("many pipes", "x = [os.pipe() for _ in range(10 ** 4)]", ERROR, "Too many open files"),
    refused("a device", "os.mknod('m', 0o60666, os.makedev(8, 0))", "os.mknod('n', 0o20666, os.makedev(1, 1))"),
    refused("a FIFO", "os.mkfifo('f')"),
    # /proc, /sys and the environment
    refused(
        "/proc",
        "open('/proc/self/environ').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/@PARENT/environ').read()",
        "open('/proc/@PARENT/mem', 'rb')",
        "os.readlink('/proc/@PARENT/exe')",
        "open('/proc/self/mem', 'wb')",
        "open('/proc/self/oom_score_adj', 'w')",
        "open('/proc/sysrq-trigger', 'w')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/self/root@SECRET').read()",
        "open('/proc/1/root@SECRET').read()",
        "os.listdir('/proc/self/fd')",
    ),
    refused("/sys", "os.listdir('/sys')", "open('/sys/kernel/uevent_helper', 'w')", "os.listdir('/sys/fs/cgroup')"),
    Program(
        "the environment",
        "print('ESCAPED' if '@WORD' in str(os.environ) + str(os.getenv('TARGET')) else 'clean')",
        says="clean",
    ),
    Program(
        "the command line",
        "print('ESCAPED' if '@WORD' in str(sys.argv) + str(sys.orig_argv) else 'clean')",
        says="clean",
    ),
    # network
    refused(
        "TCP",
        "socket.create_connection(('127.0.0.1', @PORT), 1)",
        "socket.create_connection(('1.1.1.1', 53), 1)",
        "socket.create_server(('', 0))",
    ),
    refused("UDP, raw, packets", "socket.socket(2, 2)", "socket.socket(2, 3, 1)", "socket.socket(17, 3, 768)"),
    refused("names", "socket.getaddrinfo('example.org', 80)"),
    refused("a Unix socket", "socket.socket(1).connect('@SOCKET')", "socket.socket(1).connect('\\0@WORD')"),
    refused(
        "pairs of sockets, netlink, vsock", "socket.socketpair()", "socket.socket(16, 3, 0)", "socket.socket(40, 1)"
    ),
    refused("a page", "__import__('urllib.request').request.urlopen('http://127.0.0.1:@PORT', timeout=1)"),
    # other processes
    refused(
        "signals to others",
        "os.kill(@PARENT, signal.SIGUSR1)",
        "os.kill(@VICTIM, signal.SIGKILL)",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.kill(0, signal.SIGUSR1)",
        "os.kill(-1, signal.SIGKILL)",
        "os.kill(1, signal.SIGTERM)",
        "os.killpg(@PARENT, signal.SIGUSR1)",
        "call(200, @VICTIM, 9)",
        "call(234, @VICTIM, @VICTIM, 9)",
        "call(129, @VICTIM, 9, bytes(128))",
        "signal.pidfd_send_signal(os.pidfd_open(@VICTIM), 9)",
    ),
    Program(
        "signals to all numbers",
        "n = 0\nfor pid in range(2, 40000):\n"
        "    if pid == os.getpid(): continue\n    try: os.kill(pid, signal.SIGUSR1); n += 1\n"
        "    except OSError: pass\nprint('ESCAPED' if n else 'none')",
        says="none",
    ),
    refused(
        "a signal by way of a file's owner",
        "__import__('fcntl').fcntl(os.pipe()[0], 8, @PARENT)",
        "__import__('fcntl').fcntl(os.pipe()[0], 10, 9)",
        "__import__('fcntl').fcntl(os.pipe()[0], 15, bytes(8))",
    ),
    refused("ptrace", "call(101, 16, @PARENT, 0, 0)", "call(101, 0, 0, 0, 0)", "call(101, 0x4206, os.getppid(), 0, 0)"),
    refused(
        "memory of others", "call(310, @PARENT, bytes(16), 1, bytes(16), 1, 0)", "call(311, @PARENT, 0, 0, 0, 0, 0)"
    ),
    refused(
        "descriptors of others",
        "call(438, 3, 0, 0)",
        "call(434, @PARENT, 0)",
        "call(312, @PARENT, os.getppid(), 0, 0, 0)",
    ),
    refused("priorities of others", "os.setpriority(0, @PARENT, 19)", "os.sched_setaffinity(@PARENT, {0})"),
    # the kernel
    refused(
        "namespaces",
        *(f"call(272, {flag})" for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x10000000 | 0x20000)),
    ),
    refused("enters namespaces", "call(308, 3, 0)", "call(56, 0x10000000 | 17)"),
    refused(
        "mounts",
        "call(165, b'tmpfs', b'/', b'tmpfs', 0, None)",
        "call(166, b'/proc', 2)",
        "call(155, b'.', b'.')",
        "os.chroot('.')",
        "call(428, -100, b'/', 1)",
        "call(429, 3, b'', -100, b'/', 0)",
        "call(430, b'tmpfs', 0)",
        "call(442, -100, b'/', 0, bytes(32), 32)",
    ),
    refused("io_uring", "call(425, 8, bytes(120))", "call(426, 3, 1, 0, 0)", "call(427, 3, 0, 0, 0)"),
    refused(
        "key rings",
        "call(248, b'user', b'x', b'y', 1, -3)",
        "call(250, 0, -3, 1)",
        "call(249, b'user', b'x', None, -3)",
    ),
    refused(
        "BPF, perf, userfaultfd", "call(321, 0, bytes(128), 128)", "call(298, bytes(128), 0, -1, -1, 0)", "call(323, 0)"
    ),
    refused(
        "modules, kexec, reboot",
        "call(175, bytes(8), 8, b'')",
        "call(246, 0, 0, 0, 0)",
        "call(169, 0xFEE1DEAD, 672274793, 0)",
    ),
    refused("other users", "os.setuid(0)", "os.setuid(1000)", "os.setgroups([0])", "call(126, bytes(8), bytes(24))"),
    refused("clock and name", "time.clock_settime(0, 0)", "socket.sethostname('x')", "call(170, b'x', 1)"),
    refused("watches files", "call(253)", "call(294, 0)", "call(300, 0, 0)"),
    refused(
        "takes the filter off", "call(317, 1, 0, bytes(16))", "call(157, 22, 0, 0, 0, 0)", "call(157, 1, 0, 0, 0, 0)"
    ),
    Program("calls of 32 bits by number", "tried(lambda: call(0x40000000 + 39))", says="refused"),
    Program(
        "calls of 32 bits by instruction",
        # int 0x80 with eax = 20, i386's getpid
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint('ESCAPED', f())",
        ("died",),
        "signal 31|signal 11",
    ),
    # ctypes and the interpreter
    Program("a null pointer", "ctypes.string_at(0)", ("died",), "signal 11"),
    Program("abort", "os.abort()", ("died",), "signal 6"),
    Program("C's exit", "libc.exit(0)", ("died",), "exit status"),
    Program("os._exit", "os._exit(7)", ("died",), "exit status 7"),
    Program("sys.exit", "print('before'); sys.exit(3)", says="before", again="print('alive')"),
    Program("kills itself", "os.kill(os.getpid(), signal.SIGKILL)", ("died",), "signal 9"),
    Program(
        "writes over the interpreter",
        "ctypes.memset(id(None), 255, 64); x = [None] * 100",
        ("died", "error", "timeout"),
    ),
    Program(
        "marshalled rubbish", "exec((lambda: 0).__code__.replace(co_code=b'\\xff' * 64))", ("died", "error", "timeout")
    ),
    Program(
        "monkeypatched builtins",
        "import builtins\n"
        "for n in ('len', 'isinstance', 'print', 'open', 'sum', 'type', 'list'):\n    setattr(builtins, n, None)",
        ANY,
    ),
    Program("no builtins", "import builtins\nbuiltins.__dict__.clear()", ANY),
    Program("empty sys.modules", "sys.modules.clear()", ANY, again="1 + 1"),
    Program("no sys.path", "sys.path[:] = [object()]; sys.meta_path.clear(); import colorsys", ERROR, "Error"),
    Program("false modules", "for n in ('json', 'os', 'ast'): sys.modules[n] = object()", ANY, again="print(2)"),
    Program("a broken json", "import json\njson.dumps = lambda *_, **__: '{'", ("died", "timeout")),
    Program(
        "games at exit",
        "import atexit\natexit.register(lambda: time.sleep(100)); os.register_at_fork(before=lambda: 1 / 0)",
    ),
    Program(
        "a finaliser that loops",
        "class A:\n    def __del__(self):\n        while True: pass\na = A(); del a",
        ("timeout",),
    ),
    Program(
        "a trace function", "def t(*a):\n    raise KeyError\nsys.settrace(t)\n(lambda: 0)()", ANY, again="print(1)"
    ),
    Program(
        "an audit hook",
        "def h(*a): raise RuntimeError('hooked')\nsys.addaudithook(h)\nopen('/dev/null')",
        ERROR,
        "RuntimeError",
    ),
    Program("a display of its own", "display = None; plt.show = None; Image.Image.show = None\nImage.new('L', (5, 5))"),
    # the protocol
    Program(
        "a forged answer",
        "import json\nt = json.dumps({'id': 'x', 'parts': ['ESCAPED'], 'error': None}).encode()\n"
        "os.write(3, len(t).to_bytes(4, 'big') + t)",
        ("died",),
        again="print('sound')",
    ),
    Program(
        "forged answers on all descriptors",
        "for d in range(3, 1024):\n    try: os.write(d, b'\\x00\\x00\\x00\\x02{}')\n    except OSError: pass",
        ("died",),
    ),
    Program(
        "an answer prepared for the next turn",
        "import gc\nfrom vlm_agents.sandbox import child\n"
        "def late(*_): child._write([b'\\x00\\x00\\x00\\x02{}'])\n"
        "signal.signal(signal.SIGALRM, late)\nsignal.setitimer(signal.ITIMER_REAL, 0.02)",
        again="print('sound')",
    ),
    Program("a header without end", "os.write(3, b'\\xff\\xff\\xff\\xff' + b'x' * 1000); time.sleep(9)", ("died",)),
    Program("rubbish", 'os.write(3, b\'\\x00\\x00\\x00\\x09{"id": "]\')', ("died",)),
    Program("a nested header", "t = b'[' * 30000\nos.write(3, len(t).to_bytes(4, 'big') + t)", ("died",)),
    Program(
        "sizes that would fill the memory",
        "import json\nfrom vlm_agents.sandbox import wire\n"
        "wire.packed.__globals__['json'] = type('J', (), {'dumps': staticmethod(lambda header: json.dumps("
        "{**header, 'parts': [[10 ** 6, 10 ** 6]]}))})",
        ("died",),
    ),
    Program(
        "negative sizes",
        "import json\nfrom vlm_agents.sandbox import wire\n"
        "wire.packed.__globals__['json'] = type('J', (), {'dumps': staticmethod(lambda header: json.dumps("
        "{**header, 'parts': [[-5, 10], [True, 1], [1.5, 2], None]}))})",
        ("died",),
    ),
    Program(
        "a million parts",
        "import json\nfrom vlm_agents.sandbox import wire\n"
        "wire.packed.__globals__['json'] = type('J', (), {'dumps': staticmethod(lambda header: json.dumps("
        "{**header, 'parts': ['a'] * 10 ** 6}))})",
        ("died",),
    ),
    Program("closed channel", "os.close(3)", ("died",)),
    Program("channel turned round", "os.dup2(os.pipe()[0], 3)", ("died", "timeout")),
    Program(
        "eats the next request",
        "signal.signal(signal.SIGALRM, lambda *_: os.read(3, 10 ** 6))\nsignal.setitimer(1, 0.02, 0.001)",
        ANY,
    ),
    # broken rather than hostile
    Program("no Python", "this isn't python", ERROR, "SyntaxError"),
    Program("a null byte", "x = 1\x00", ERROR, "null"),
    Program("nothing", ""),
    Program("a name that isn't there", "print(image_clue_9)", ERROR, "NameError"),
    Program("a module that isn't there", "import no_such_module", ERROR, "ModuleNotFoundError"),
    Program("a crop outside", "Image.new('L', (5, 5)).crop((9, 9, 1, 1)).show()", ERROR),
]


@dataclass
class World:
    """What programs aim at, and whether it is as it was."""

    folder: Path
    listeners: list[socket.socket]
    victim: subprocess.Popen[bytes]
    signals: list[int] = field(default_factory=list)
    word: str = "target-7f3a"

    @property
    def secret(self) -> Path:
        return self.folder / "secret.txt"

    def aimed(self, code: str) -> str:
        targets = {
            "@SECRET": str(self.secret),
            "@FOLDER": str(self.folder),
            "@PACKAGE": str(Path(__file__).resolve()),
            "@PARENT": str(os.getpid()),
            "@VICTIM": str(self.victim.pid),
            "@PORT": str(self.listeners[0].getsockname()[1]),
            "@SOCKET": str(self.listeners[1].getsockname()),
            "@WORD": self.word,
        }
        for name, value in targets.items():
            code = code.replace(name, value)
        return code

    def restore(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        self.secret.write_text(self.word)
        self.secret.chmod(0o644)
        self.signals.clear()

    def harm(self) -> str:
        """What has been done to it; an empty string where nothing has."""
        if not self.folder.exists() or os.listdir(self.folder) != ["secret.txt"]:
            return "the target's folder was changed"
        state = self.secret.stat()
        if state.st_mode & 0o777 != 0o644 or state.st_mtime < 1000 or self.secret.read_text() != self.word:
            return "the target's file was changed"
        if self.victim.poll() is not None or self.signals:
            return f"processes were signalled: {self.signals}, {self.victim.poll()}"
        for listener in self.listeners:
            try:
                listener.accept()
            except BlockingIOError:
                continue
            return "somebody connected"
        return ""


@contextmanager
def world() -> Iterator[World]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="target_")))
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sockets_")))
        folder.chmod(0o755)
        sockets.chmod(0o755)
        tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
        unix.bind(str(sockets / "socket"))
        unix.listen()
        (sockets / "socket").chmod(0o777)
        for listener in (tcp, unix):
            stack.enter_context(listener)
            listener.setblocking(False)
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10000)"])
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        found = World(folder, [tcp, unix], victim)
        found.restore()
        os.environ["TARGET"] = found.word
        stack.callback(os.environ.pop, "TARGET")

        def note(number: int, frame: FrameType | None) -> None:
            found.signals.append(number)

        stack.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, note))
        yield found


def descendants() -> int:
    """Processes that this one started, and those that they started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(path.parent.name), path.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if rest[0] != "Z":
            parents[pid] = int(rest[1])
    count, new = 0, {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        count += len(new)
    return count


class Neighbour:
    """A session that is in the middle of something else."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._session = sandbox.open({"image_clue_0": Image.new("RGB", (40, 30), "red")})
        self._turns = 0
        self._session.run("import os; turns = 0; open('mine', 'w').write('mine')")

    def harm(self) -> str:
        self._turns += 1
        result = self._session.run(
            "turns += 1; print(turns, open('mine').read(), os.listdir()); image_clue_0.crop((0, 0, 5, 4))"
        )
        said = f"{self._turns} mine ['mine']\n"
        right = result.ended == "done" and result.text == said and [i.size for i in result.images] == [(5, 4)]
        return "" if right else f"a neighbour's turn came out wrong: {result}"


def wrong(program: Program, session: Session, target: World) -> str:
    """What is wrong with how the program was contained; an empty string where nothing is."""
    assert session.run(TOOLS).error is None
    result = session.run(target.aimed(program.code))
    results = [result, session.run(program.again)] if program.again else [result]
    for found in results:
        said = f"{found.text}{found.error or ''}"
        # The echo of a line of code in a traceback isn't the word printed.
        if ESCAPED in found.text or target.word in found.text:
            return f"it got out: {found.text[:300]}"
        if "vlm_agents/" in said or "site-packages/" in said:
            return f"it saw where things lie: {said[:300]}"
        if len(said) > 3 * SETTINGS.output_chars or len(found.images) > SETTINGS.pictures:
            return f"it said {len(said)} characters and showed {len(found.images)} pictures"
        if any(image.width * image.height > SETTINGS.picture_pixels for image in found.images):
            return "it showed a picture that is too large"
        if found.seconds > SETTINGS.turn_s + 3:
            return f"it took {found.seconds:.1f} s"
    if result.ended not in program.ended:
        return f"it ended with {result.ended}, not {' or '.join(program.ended)}: {result.text[:200]} {result.error}"
    if not re.search(program.says, f"{result.text}{result.error or ''}"):
        return f"it didn't say {program.says!r} but {result.text[:200]!r} {result.error!r}"
    return "" if session.run("print(6 * 7)").text == "42\n" or program.ended == ANY else _alive(session)


def _alive(session: Session) -> str:
    """A session whose own names were broken may fail once more; it must be of use after a restart."""
    again = session.run("print(6 * 7)")
    return "" if again.ended in ("error", "done") else f"its session is of no use any more: {again}"


def drill(require: Require, programs: list[Program] = PROGRAMS) -> list[str]:
    """What went wrong, one line each."""
    failures = []
    with world() as target, Sandbox(replace(SETTINGS, require=require)) as sandbox:
        neighbour = Neighbour(sandbox)
        calm = descendants()
        for program in programs:
            with sandbox.open() as session:
                found = wrong(program, session, target)
            found = found or target.harm() or neighbour.harm()
            found = found or _left_over(calm)
            if found:
                failures.append(f"{program.name}: {found}")
                target.restore()
    return failures


def _left_over(calm: int) -> str:
    """Are more processes there than before the program? A killed one is gone soon, not at once."""
    deadline = time.monotonic() + 1
    while (running := descendants()) > calm:
        if time.monotonic() > deadline:
            return f"{running - calm} processes are left"
        time.sleep(0.02)
    return ""


# Where a secret may be put, and where it may be looked for. Both see `secret`, and SEEN collects what a hunt finds.
HIDE = """
x_{n} = secret
import builtins; builtins.secret_{n} = secret
import os; os.environ['S{n}'] = secret
open('s{n}', 'w').write(secret)
np.secret_{n} = secret
import sys; sys.modules['s{n}'] = secret
open(os.path.join(os.environ['TMPDIR'], 't{n}'), 'w').write(secret)
leak_{n} = [np.frombuffer(secret.encode() * 100, dtype=np.uint8).copy() for _ in range(20)]; del leak_{n}
plt.figure(figsize=(1, 1)); plt.title(secret); plt.close('all')
Image.new('L', (8, 8)).info['s'] = secret
for p in ('/tmp/s', '/dev/shm/s', '../s'): exec("try: open(p + '{n}', 'w').write(secret)\\nexcept OSError: pass")
for d in range(4, 64): exec("try: os.write(d, secret.encode())\\nexcept OSError: pass")
print(secret)
raise ValueError(secret)
os._exit(3)
""".strip().splitlines()
HUNT = """
print([v for v in list(globals().values()) if isinstance(v, str) and len(v) < 100])
import builtins; print([v for k, v in vars(builtins).items() if k.startswith('secret')])
import os; print(dict(os.environ))
import os; print([(d, f, open(os.path.join(d, f)).read()) for d, _, fs in os.walk('.') for f in fs])
import os; print([(d, fs) for top in ('/tmp', '/sandbox', '/dev/shm', '/var/tmp', '..') for d, _, fs in os.walk(top)])
print([v for k, v in vars(np).items() if k.startswith('secret')])
import sys; print([v for v in sys.modules.values() if isinstance(v, str)])
import gc; print([o for o in gc.get_objects() if isinstance(o, dict) and 'secret' in o][:3])
import gc; print([v for o in gc.get_objects() if isinstance(o, dict) for v in o.values() if 'SECRET-' in str(v)[:9]])
import re; print(re.findall(rb'SECRET-[0-9]+-[0-9a-f]+', np.empty(1 << 22, dtype=np.uint8).tobytes())[:20])
import ctypes; print(re.findall(rb'SECRET-[0-9]+-[0-9a-f]+', ctypes.string_at(id(secret) - (1 << 15), 1 << 16))[:20])
import os; print([os.read(d, 4096) for d in range(4, 64) if os.path.exists('/dev/fd/%d' % d)])
import os; print(open('/proc/self/maps').read())
import os; print([open('/proc/%d/environ' % p).read() for p in range(1, 100)])
import os; print(os.listdir(os.path.dirname(os.getcwd())))
print(Image.new('RGB', (64, 64)).tobytes()[:10], plt.get_fignums())
""".strip().splitlines()
MARK = re.compile(r"SECRET-(\d+)-[0-9a-f]+")


def drawn(rng: random.Random, secret: str) -> list[str]:
    """The turns of one random program."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        lines = rng.choices(HIDE[:-1], k=rng.randint(1, 3)) + rng.choices(HUNT, k=rng.randint(1, 3))
        rng.shuffle(lines)
        if rng.random() < 0.02:
            lines.append(HIDE[-1])
        lines = [line.replace("{n}", str(rng.randint(0, 9))) for line in lines]
        guarded = (f"try: exec({line!r})\nexcept Exception as e: print(e)" for line in lines)
        turns.append(f"import re\nsecret = {secret!r}\n" + "\n".join(guarded))
    return turns


@dataclass
class Tally:
    programs: int = 0
    own: int = 0  # programs that found their own secret: the hunt can find
    leaks: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)


def hunt(require: Require, count: int, seed: int = 0, at_once: int = 4) -> Tally:
    """Run so many random programs, some at a time, and see which secrets their answers hold."""
    tally = Tally()
    with Sandbox(SandboxSettings(require=require, turn_s=20.0)) as sandbox:
        sandbox.isolated  # noqa: B018 (starts it)

        def play(index: int) -> list[Result]:
            rng = random.Random(f"{seed}/{index}")
            with sandbox.open() as session:
                return [session.run(code) for code in drawn(rng, f"SECRET-{index}-{rng.getrandbits(64):x}")]

        with ThreadPoolExecutor(at_once) as pool:
            for index, results in enumerate(pool.map(play, range(count))):
                said = "".join(f"{result.text}{result.error or ''}" for result in results)
                seen = {int(found) for found in MARK.findall(said)}
                tally.programs += 1
                tally.own += index in seen
                tally.leaks += [f"program {index} saw the secret of {other}" for other in seen - {index}]
                tally.ended.update(result.ended for result in results)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolation", default="isolated", choices=["isolated", "bubblewrap", "landlock", "rlimits"])
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random programs instead")
    parser.add_argument("--only", default="", help="part of the names of the programs to run")
    asked = parser.parse_args()
    began = time.monotonic()
    if asked.random:
        tally = hunt(asked.isolation, asked.random)
        failures = tally.leaks
        print(
            f"{tally.programs} random programs, {tally.own} of which saw their own secret; turns: {dict(tally.ended)}"
        )
        print(f"{len(failures)} leaks in {time.monotonic() - began:.0f} s")
    else:
        programs = [program for program in PROGRAMS if asked.only in program.name]
        failures = drill(asked.isolation, programs)
        print(f"{len(programs) - len(failures)} of {len(programs)} contained in {time.monotonic() - began:.0f} s")
    print("\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
