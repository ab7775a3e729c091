"""Progress bars for what takes longer than a glance, and nothing at all where nobody watches. Not a logger."""

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
