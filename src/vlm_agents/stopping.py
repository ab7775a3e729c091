"""SIGUSR2: a run is asked to save and to end, as Slurm asks it before a job's time is over or its nodes are taken.

Whoever was to be called by that signal before us, submitit's handler that queues the job again, is called in the end:
once the run has saved, or after `grace` seconds in which it couldn't.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

grace = 90.0  # seconds; Slurm's launcher sets what its signal_delay_s leaves
STATUS = 75  # exit status of a run that ended so: EX_TEMPFAIL, try again
FILE = "VLM_AGENTS_STOP"  # names the file by which a launcher asks its ranks


class Stopped(KeyboardInterrupt):
    """The run was asked to end, and has saved what it had."""


_asked = False


def asked() -> bool:
    """Was this process asked to, by a signal or by its launcher?"""
    return _asked or (bool(os.environ.get(FILE)) and Path(os.environ[FILE]).exists())


def note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def heed() -> None:
    """From here on the signal is noted, which a command hasn't seen before."""
    global _asked
    _asked = False
    signal.signal(signal.SIGUSR2, note)


@contextmanager
def heeded(tell: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """Within it the signal is noted, and `tell` called. A run that ends by Stopped has the earlier handler called,
    where there was one; so has one that doesn't end in time."""
    global _asked
    before, alarm = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGALRM)
    earlier = None if before is note else before

    def hand_over(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if callable(earlier):
            earlier(signal.SIGUSR2, frame)

    def heed(number: int, frame: FrameType | None) -> None:
        note(number, frame)
        tell()
        if callable(earlier):
            signal.signal(signal.SIGALRM, hand_over)
            signal.setitimer(signal.ITIMER_REAL, grace)

    signal.signal(signal.SIGUSR2, heed)
    try:
        yield
    except Stopped:
        hand_over(signal.SIGUSR2, None)
        if callable(earlier):
            time.sleep(grace)  # who didn't end this process leaves that to another: the job's first node, then Slurm
        raise
    finally:
        if _asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGUSR2, before)
        _asked = _asked and before is note  # a sweep or a chain may go on with others
