"""What is said while something runs: bars on a terminal, elsewhere a line once it has been silent for a while."""

import io
import logging
import time
import warnings

import pytest
from rich.console import Console

from vlm_agents import progress
from vlm_agents.progress import Ours, duration, say, track, under_way


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a log file gets from here on, with nothing said before; 5 s of silence are 0.1 s, and 120 s are 0.4 s."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=200))
    monkeypatch.setattr(progress, "_screen", progress._Screen())
    monkeypatch.setattr(progress, "SHORTEST", 0.1)
    monkeypatch.setattr(progress, "LONGEST", 0.4)
    return file


def test_a_short_run_makes_no_noise(printed: io.StringIO):
    assert list(track(range(3), "collect", 3)) == [0, 1, 2]
    assert printed.getvalue() == ""


def test_a_log_file_hears_of_work_in_the_middle_of_a_step_with_growing_gaps(printed: io.StringIO):
    for _ in track(range(2), "collect", 37, "episodes", done=1):
        time.sleep(0.6)  # as a step that takes minutes
    lines = printed.getvalue().splitlines()
    # silence of 0.1, 0.1, then half of the time so far, 0.1, 0.15, 0.22, 0.34, 0.4: lines at 0.1, 0.2, 0.3, 0.45, 0.68,
    # 1.01 s; a busy machine may be late, never early
    assert 2 <= len(lines) <= 6
    assert lines[0] == "collect 1/37 episodes, 0 s"
    assert lines[-1] == "collect 2/37 episodes, 1 s"


def test_what_stays_the_same_is_said_ever_more_seldom(printed: io.StringIO):
    with under_way("eval model:", 60):
        time.sleep(0.65)
    # silence of 0.1, 0.1, 0.2 and 0.4: lines at 0.1, 0.2, 0.4 s, where it was one in 0.1 s, then 0.15 s
    assert 1 <= len(printed.getvalue().splitlines()) <= 3


def test_the_innermost_work_is_told_and_any_line_breaks_the_silence(printed: io.StringIO):
    with under_way("collect", 4), under_way("reading model a"):
        time.sleep(0.15)
    with under_way("sft step", 9) as work:
        work.reach(3, "loss 0.31")
        say(str(work))
        for _ in range(4):
            time.sleep(0.02)
            say("news")
    lines = printed.getvalue().splitlines()
    assert lines == ["reading model a, 0 s", "sft step 3/9 loss 0.31, 0 s", *["news"] * 4]


def test_a_terminal_has_a_bar_for_each_work(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    file.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=120))
    monkeypatch.setattr(progress, "_screen", progress._Screen())
    with under_way("sft step", 9, 2) as work, under_way("reading [model] a"):
        work.reach(3, "loss 0.31")
        time.sleep(0.2)  # bars are drawn ten times a second
    assert all(text in file.getvalue() for text in ("sft step", "3/9", "loss 0.31", "reading [model] a"))


def test_a_pipe_gets_no_bar_though_colours_are_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file))
    monkeypatch.setattr(progress, "_screen", progress._Screen())
    assert list(track(range(3), "collect", 3)) == [0, 1, 2]
    assert file.getvalue() == ""


def test_times_are_told_as_a_person_would():
    assert [duration(seconds) for seconds in (47.6, 119, 725, 12_000)] == ["48 s", "119 s", "12 min", "3 h 20 min"]


def test_of_other_libraries_errors_alone_are_printed():
    def passes(name: str, level: int) -> bool:
        return bool(Ours().filter(logging.LogRecord(name, level, "", 1, "", (), None)))

    assert passes("vlm_agents.run", logging.WARNING)
    assert passes("hydra_plugins.launcher", logging.INFO)
    assert not passes("alembic.runtime", logging.WARNING)
    assert passes("mlflow", logging.ERROR)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_fails_the_tests_whoever_warns(category: type[Warning]):
    with pytest.raises(category):
        warnings.warn_explicit("`x` is deprecated", category, "modeling.py", 1, "transformers.models.x")
