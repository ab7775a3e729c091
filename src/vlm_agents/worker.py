"""One rank of a run: `python -m vlm_agents.worker <job>`, started by launch.py and by nobody else."""

import atexit
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path

from vlm_agents import stopping
from vlm_agents.errors import VlmAgentsError
from vlm_agents.launch import LOST, Job, tell
from vlm_agents.processes import end_with_parent
from vlm_agents.progress import LogLine, Ours, hush, keep_quiet
from vlm_agents.world import PeerLost, World, joined

BROKEN = "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"  # in what libraries say of a lost rank


def main(note: Path) -> int:
    """Do this rank's part of the run; the exit status."""
    end_with_parent()  # a launcher that was killed can't end its ranks, which would hold the run directory
    signal.signal(signal.SIGUSR2, stopping.note)
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
    with Run.open(job.cfg, job.overrides, job.sweep, world) as run:
        stages.main(job.cfg, run)
        world.wait()


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
