"""One rank of a run: `python -m vlm_agents.worker <job>`, started by launch.py and by nobody else."""

import atexit
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

from vlm_agents import stopping
from vlm_agents.errors import VlmAgentsError
from vlm_agents.launch import LOST, Job, tell
from vlm_agents.processes import end_with_parent
from vlm_agents.progress import LogLine, Ours, hush, keep_quiet
from vlm_agents.world import PeerLost, World, joined

BROKEN = "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"  # in what libraries say of a lost rank


def main(note: Path) -> int:
    """Do this rank's part of the run; the exit status."""
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the launcher's to heed
    end_with_parent(signal.SIGKILL)  # a launcher that was killed can't end its ranks, which may wait for each other
    stopping.heed()
    tempfile.tempdir = str(note.parent)  # so that nothing is left of a rank that is killed
    hush()
    job: Job = pickle.loads(note.read_bytes())
    try:
        with joined(job.cfg.hardware.device) as world:
            do(job, world)
    except stopping.Stopped:
        return stopping.STATUS
    except KeyboardInterrupt:  # which the launcher tells
        return 130
    except PeerLost:
        return LOST
    except Exception as error:  # noqa: BLE001 - the launcher tells it, once for all ranks
        if not isinstance(error, VlmAgentsError) and any(word in str(error) for word in BROKEN):
            return LOST
        tell(error, traceback.format_exc(), time.time())
        return 2 if isinstance(error, VlmAgentsError) else 1
    return 0


def do(job: Job, world: World) -> None:
    from vlm_agents import stages
    from vlm_agents.run import Run

    if not world.main:
        keep_quiet()
    try:
        with Run.open(job.cfg, job.overrides, job.sweep, world) as run:
            stages.main(job.cfg, run)
    except stopping.Stopped:
        world.wait()  # who ends has the others ended, and the first has a tracker to tell
        raise
    world.wait()


def ended(number: int, frame: FrameType | None) -> None:
    """The launcher ends this rank, as another one has failed, or as it was ended itself."""
    if sys.exc_info()[0] is None:  # else it is about to end
        raise PeerLost


if __name__ == "__main__":
    screen = logging.StreamHandler()  # as conf/config.yaml has it
    screen.setFormatter(LogLine("[%(asctime)s] %(message)s"))
    screen.addFilter(Ours())
    logging.basicConfig(level=logging.WARNING, handlers=[screen])
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0:
        atexit._run_exitfuncs()
    os._exit(
        status
    )  # at once: threads that wait for a lost rank would hold it up, and gloo's may abort at a normal end
