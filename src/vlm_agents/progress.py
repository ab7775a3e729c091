"""What a terminal gets while a stage runs: progress bars, where somebody watches, and lines of text. Not a logger."""

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm_agents.errors import harmless

console = Console(stderr=True)
Item = TypeVar("Item")


def say(line: str) -> None:
    """One plain line for whoever watches, above any bar."""
    console.print(harmless(line), highlight=False, markup=False, soft_wrap=True)


class LogLine(logging.Formatter):
    """How conf/config.yaml has log records printed: a message is one line, and a terminal has nothing to obey in it or
    in a traceback, for they quote data, envs and servers."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items, with a bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=label)
