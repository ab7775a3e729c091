"""Where a command begins: what stops it, by a signal or an error, is told in one line. It imports next to nothing, so
that this holds while the rest is imported too."""

import signal
import sys
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which Slurm and Docker end a run: like an interrupt, with a name and an exit status of its own."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> int:
    """Run the command line in `sys.argv`; the exit status."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        from vlm_agents.command_line import run

        return run(sys.argv)
    except KeyboardInterrupt as stop:
        word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"{word}; the same command with the run's name= continues it", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
