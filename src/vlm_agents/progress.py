"""What whoever watches gets while a stage runs: bars on a terminal, plain lines now and then in a pipe or log file.
Not a logger."""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm_agents.errors import harmless

console = Console(stderr=True)
Item = TypeVar("Item")

# A log file is told how far the work is once it has been silent for this share of the run's time, within these seconds.
SILENCE, SHORTEST, LONGEST = 0.5, 5.0, 120.0


def say(line: str) -> None:
    """One plain line for whoever watches, above any bar."""
    _screen.spoken = time.monotonic()
    console.print(harmless(line), highlight=False, markup=False, soft_wrap=True)


def keep_quiet() -> None:
    """Say nothing from here on, in a rank that isn't the first."""
    console.quiet = True
    logging.getLogger("vlm_agents").setLevel(logging.CRITICAL)


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3 h 20 min`."""
    minutes = int(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class LogLine(logging.Formatter):
    """How conf/config.yaml has log records printed: a message is one line, and a terminal has nothing to obey in it or
    in a traceback, for they quote data, envs and servers."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class Ours(logging.Filter):
    """Which log records conf/config.yaml has printed: ours and Hydra's; of other libraries their errors alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name.startswith(("vlm_agents", "hydra"))


def hush() -> None:
    """Keep the warnings of other libraries off the screen, here and in worker processes, unless Python was asked for
    them (`-W default`, PYTHONWARNINGS). What torch says of a GPU that it can't use stays: nobody else says it."""
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"torch\.cuda")


class Work:
    """Something that takes its time, and how far it is. Made by `under_way`."""

    def __init__(self, label: str, total: int | None, done: int, detail: str) -> None:
        self.label, self.total, self.done, self.detail = label, total, done, detail
        self.begun = time.monotonic()

    def reach(self, done: int, detail: str | None = None) -> None:
        """`done` of the total are done; `detail` is told beside it."""
        self.done, self.detail = done, self.detail if detail is None else detail
        _screen.show(self)

    @property
    def state(self) -> str:
        figures = [f"{self.done}/{self.total}"] if self.total else [str(self.done)] if self.done else []
        return " ".join([self.label, *figures, *([self.detail] if self.detail else [])])

    def __str__(self) -> str:
        return f"{self.state}, {duration(time.monotonic() - self.begun)}"


class _Screen:
    """The works under way, the innermost last. A terminal has a bar for each. Elsewhere a thread tells of the last one
    whenever nothing has been said for a while, for a step may take minutes."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.begun = 0.0  # when the first work began
        self.spoken = 0.0  # when the last line was printed
        self.state, self.told = "", 0  # that of the last line, and how often it was told
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._bars: Progress | None = None
        self._thread: threading.Thread | None = None

    def enter(self, work: Work) -> None:
        self.begun = self.begun or work.begun
        self.spoken = self.spoken or work.begun
        with self._lock:
            self.works.append(work)
        if len(self.works) == 1:
            self._start()
        if self._bars:
            self._bars.add_task(harmless(work.label), total=work.total, completed=work.done, detail=work.detail)

    def show(self, work: Work) -> None:
        if self._bars and work in self.works:
            task = self._bars.task_ids[self.works.index(work)]
            self._bars.update(task, completed=work.done, detail=work.detail)

    def leave(self, work: Work) -> None:
        if self._bars:
            self._bars.remove_task(self._bars.task_ids[self.works.index(work)])
        with self._lock:
            self.works.remove(work)
        if not self.works:
            self._stop()

    def _start(self) -> None:
        if console.is_interactive and console.file.isatty():  # the first alone is forced by FORCE_COLOR
            label, detail = (TextColumn(f"{{task.{it}}}", markup=False) for it in ("description", "fields[detail]"))
            columns = label, BarColumn(), MofNCompleteColumn(), detail, TimeElapsedColumn(), TimeRemainingColumn()
            self._bars = Progress(*columns, console=console, transient=True)
            self._bars.start()
            return
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, args=(self._over,), name="progress", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = None
        if self._thread:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _tell(self, over: threading.Event) -> None:
        while not over.wait(max(0.01, self.spoken + self._silence() - time.monotonic())):
            if time.monotonic() - self.spoken >= self._silence():
                with self._lock:
                    state, line = (self.works[-1].state, str(self.works[-1])) if self.works else ("", "")
                if line:
                    say(line)
                    self.state, self.told = state, self.told + 1 if state == self.state else 0

    def _silence(self) -> float:
        """How long nothing may be said; the longer, the oftener it would be the same."""
        return min(LONGEST, max(SHORTEST * 2**self.told, SILENCE * (self.spoken - self.begun)))


_screen = _Screen()


@contextmanager
def under_way(label: str, total: int | None = None, done: int = 0, detail: str = "") -> Iterator[Work]:
    """Tell of this work for as long as the block lasts: `<label> <done>/<total> <detail>, <seconds>`."""
    work = Work(label, total, done, detail)
    if threading.current_thread() is not threading.main_thread():  # whoever waits for it tells of that
        yield work
        return
    _screen.enter(work)
    try:
        yield work
    finally:
        _screen.leave(work)


def track(items: Iterable[Item], label: str, total: int | None, unit: str = "", done: int = 0) -> Iterator[Item]:
    """Yield the items, and tell how many of `total` (None: nobody knows) are done with; `done` were before."""
    with under_way(label, total, done, unit) as work:
        for number, item in enumerate(items, done + 1):
            yield item
            work.reach(number)
