"""Where a command begins: what stops it, by a signal or an error, is told in one line. It imports next to nothing, so
that this holds while the rest is imported too."""

import os
import select
import signal
import sys
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which Slurm and Docker end a run, or SIGHUP, by which a terminal that is closed does: like an
    interrupt, with a name and an exit status of its own."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def say_why(stop: KeyboardInterrupt) -> int:
    """Say what ended this command; the exit status."""
    from vlm_agents.stopping import STATUS, Stopped

    word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
    if isinstance(stop, Stopped):
        word, status = "stopped", STATUS
    print(f"{word}; the same command with the run's name= continues it", file=sys.stderr)
    return status


def heed_signals() -> None:
    """Of those that end a command, but for the one that Python heeds itself."""
    from vlm_agents import stopping

    stopping.heed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            signal.signal(number, terminate)


def closed(stream: int) -> bool:
    """Has the reader of this pipe gone, as that of `| head`?"""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main() -> int:
    """Run the command line in `sys.argv`; the exit status."""
    heed_signals()
    try:
        from vlm_agents.command_line import run

        status = run(sys.argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not (closed(1) or closed(2)):
            raise  # another pipe than that of our words
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if closed(1) else 2)  # for what Python flushes at its end
        return 141
    except KeyboardInterrupt as stop:
        return say_why(stop)


if __name__ == "__main__":
    sys.exit(main())
