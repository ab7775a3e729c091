"""Processes that are ended."""

import subprocess
import time

from vlm_agents.processes import end

STUBBORN = "trap '' TERM; sleep 100 & echo $!; wait"


def test_those_that_stay_are_killed_together_with_what_they_started():
    """Two that ignore SIGTERM, as what they started does, have one grace and not one after the other."""
    made = [subprocess.Popen(["sh", "-c", STUBBORN], stdout=subprocess.PIPE, process_group=0) for _ in range(2)]
    pipes = [process.stdout for process in made if process.stdout]
    for pipe in pipes:
        pipe.readline()
    begun = time.monotonic()
    end(made, 0.5)
    assert 0.5 <= time.monotonic() - begun < 1
    assert [process.returncode for process in made] == [-9, -9]
    assert [pipe.read() for pipe in pipes] == [b"", b""]  # closed by the last process that had it
    for pipe in pipes:
        pipe.close()
