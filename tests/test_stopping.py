"""A run that is asked to end, and who is called then."""

import signal
import time
from collections.abc import Iterator

import pytest

from vlm_agents import stopping


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Each call of the handler that was there before, submitit's under Slurm; here it ends nothing."""
    monkeypatch.setattr(stopping, "grace", 0.2)
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR2, before)


def test_a_run_that_has_stopped_hands_over_and_waits_to_be_ended(called: list[int]):
    # submitit's handler does nothing on other nodes than the first, which must not end before that has queued the job
    @stopping.heeded()
    def run() -> None:
        signal.raise_signal(signal.SIGUSR2)
        assert stopping.asked()
        assert not called
        raise stopping.Stopped

    start = time.monotonic()
    with pytest.raises(stopping.Stopped):
        run()
    assert called == [signal.SIGUSR2]
    assert time.monotonic() - start > 0.2
    assert not stopping.asked()


def test_a_run_that_does_not_stop_in_time_is_handed_over(called: list[int]):
    with stopping.heeded():
        signal.raise_signal(signal.SIGUSR2)
        time.sleep(0.1)
        assert not called
        time.sleep(0.2)
        assert called == [signal.SIGUSR2]
        time.sleep(0.3)
    assert called == [signal.SIGUSR2]  # once
