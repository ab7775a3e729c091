"""Files that survive, and who holds them."""

import errno
import fcntl
from pathlib import Path

import pytest

from vlm_agents.files import hold


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_of_another_is_not_ours_by_whichever_error_the_system_says_so(tmp_path: Path, monkeypatch, number: int):
    """POSIX leaves it the choice. Another process than this one is played by the system call."""

    def held(file, flags) -> None:
        raise OSError(number, "held")

    with open(tmp_path / "lock", "ab") as file:
        assert hold(file)
        monkeypatch.setattr(fcntl, "lockf", held)
        assert not hold(file)
