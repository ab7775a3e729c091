"""What a process of ours asks of the system: for another one that it starts, or of its own environment."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process be sent this signal when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Have processes end by SIGTERM, each of which was started in a process group of its own; kill those that haven't
    after `grace_s`, all together, and what any of them leaves behind in its group."""
    deadline = time.monotonic() + grace_s
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def environment(changed: Mapping[str, str | None]) -> Iterator[None]:
    """Within it these variables are so, here and in processes that are started; None: not there."""
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
