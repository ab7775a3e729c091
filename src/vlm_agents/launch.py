"""A run of several ranks: a process for each on this machine, started by torch's elastic launcher and watched until all
are done, or until one fails, which ends the others. Of a job of several nodes each does this, and the ranks find each
other.
"""

import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm_agents import errors, stages, stopping
from vlm_agents.config import HardwareConfig, PpoConfig, RunConfig, SftConfig
from vlm_agents.errors import ConfigError, TrainingError
from vlm_agents.files import atomic_write
from vlm_agents.processes import environment
from vlm_agents.progress import say
from vlm_agents.run import Run, finished_metrics
from vlm_agents.seeds import stable_hash
from vlm_agents.weights import has_model

SHARED = ("collect", "eval", "sft", "ppo")  # stages whose work several ranks share
LOST_ANOTHER = "lost another one"  # what a rank says whose end is only that of another
LOST = 3  # exit status of a rank that another's end has ended
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # end the ranks, and then us
SHUTDOWN = 15  # seconds that a rank has to end when another has failed
RENDEZVOUS = 900  # seconds that nodes wait for each other


@dataclass(frozen=True)
class Job:
    """What a rank needs to know, beside its number."""

    cfg: RunConfig
    overrides: Sequence[str]
    sweep: Path | None


class RankError(Exception):
    """A rank met an error of ours, and this is its traceback."""


@dataclass(frozen=True)
class Nodes:
    """The machines of the job that this process belongs to, and which of them this is."""

    number: int = 0
    first: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def here(cls, nodes: int) -> "Nodes":
        """As Slurm says to a task of a step, one on each node. ConfigError where those are others than the run's."""
        if nodes == 1:
            return cls()
        from submitit.slurm.slurm import SlurmJobEnvironment

        where = "this is no task of Slurm's"
        if "SLURM_STEP_ID" in os.environ:
            job = SlurmJobEnvironment()
            there, tasks = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", nodes)) for what in ("NODES", "TASKS"))
            if job.num_nodes == there == tasks == nodes:
                port = 20_000 + stable_hash("rendezvous", job.job_id) % 10_000
                return cls(job.node, job.hostnames[0], port)
            where = f"srun began {tasks} task{'s' if tasks > 1 else ''} on {there} of this job's {job.num_nodes} nodes"
        raise ConfigError(
            f"hardware.nodes={nodes}: {where}. Add -m hydra/launcher=slurm, or give it to srun, one task a node: "
            f"srun --nodes={nodes} --ntasks-per-node=1; each starts the ranks of its node"
        )


def has_ranks(cfg: RunConfig) -> bool:
    """Is the run to be done by several ranks? A stage that no model has a part in is done by one process."""
    return cfg.hardware.ranks > 1 and cfg.stage.name in SHARED and has_model(cfg)


def do(job: Job) -> dict[str, float]:
    """Do the run, here or by ranks, and return its metrics; none where another node is the first."""
    if has_ranks(job.cfg):
        nodes = Nodes.here(job.cfg.hardware.nodes)
        run_ranks(job, nodes)
        return (nodes.number == 0 and finished_metrics(job.cfg)) or {}
    if "SUBMITIT_EXECUTOR" in os.environ and int(os.environ.get("SLURM_NODEID", 0)):
        return {}  # what one process does is done on the job's first node
    with stopping.heeded(), Run.open(job.cfg, job.overrides, job.sweep) as run:
        return stages.main(job.cfg, run)


def run_ranks(job: Job, nodes: Nodes) -> None:
    """Have the ranks of this machine do the run, again from its newest checkpoint where one was killed.

    Raises what stopped them, as if it had been done here.
    """
    hardware = job.cfg.hardware
    if line := idle(job.cfg):
        say(line)
    with TemporaryDirectory(prefix="vlm_agents_") as folder:
        note = Path(folder) / "job"
        note.write_bytes(pickle.dumps(job))
        asked = Path(folder) / "stop"
        with stopping.heeded(asked.touch), environment({stopping.FILE: str(asked)}):
            for left in reversed(range(hardware.restarts + 1)):
                try:
                    return start(hardware, nodes, note, left)
                except Killed as killed:
                    if (Path(job.cfg.run_dir) / "DONE").exists():  # all was written before
                        return None
                    if not left:
                        raise TrainingError(
                            f"{killed}; the same command continues from the newest checkpoint"
                        ) from None
                    say(f"{killed}: all ranks begin again from the newest checkpoint, {left} more times at most")


def idle(cfg: RunConfig) -> str:
    """A line where there is less to share than there are ranks; else empty."""
    match cfg.stage:
        case PpoConfig(episodes=episodes) if cfg.algo:
            parts, what = episodes // cfg.algo.group_size, "starts an iteration (stage.episodes / algo.group_size)"
        case SftConfig(batch_size=parts):
            what = "rows a step (stage.batch_size)"
        case stage:
            parts, what = getattr(stage, "episodes", cfg.hardware.ranks), "episodes (stage.episodes)"
    ranks = cfg.hardware.ranks
    return f"warning: {ranks} ranks share {parts} {what}: {ranks - parts} of them idle" if parts < ranks else ""


class Killed(Exception):
    """A rank was ended by a signal."""


def start(hardware: HardwareConfig, nodes: Nodes, note: Path, left: int) -> None:
    """Start the ranks of this machine, each of which sees a GPU of its own where there are any, and wait for them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:  # each has a level of its own; what they know is told here, in a line
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    alone, count = hardware.nodes == 1, hardware.nodes
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}  # as by nohup
    config = LaunchConfig(
        min_nodes=count,
        max_nodes=count,
        nproc_per_node=hardware.processes,
        run_id=note.parent.name if alone else "nodes",
        rdzv_backend="c10d" if alone else "static",  # by which rank 0 is on the first node
        # another port each time: until all nodes have left it, the store of the time before may still answer
        rdzv_endpoint=f"{nodes.first}:{0 if alone else nodes.port + left}",
        rdzv_configs={"is_host": True} if alone else {"rank": nodes.number, "timeout": RENDEZVOUS},
        local_addr=nodes.first if alone else None,
        virtual_local_rank=hardware.device != "cpu",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN,
        logs_specs=DefaultLogsSpecs(log_dir=str(note.parent)),  # removed with that folder
        signals_to_handle=",".join(number.name for number in handlers),
    )
    stopped = None
    try:
        elastic_launch(config, sys.executable)("-m", "vlm_agents.worker", str(note))
    except ChildFailedError as error:
        raise cause(error.failures) from None
    except SignalException as stop:
        stopped = stop.sigval
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped is not None:
        signal.raise_signal(stopped)  # to whom it would have gone without the launcher
        raise KeyboardInterrupt


def cause(failures: Any) -> BaseException:
    """What ended the ranks, of all that was found when they were: not those that only lost another."""
    told = []
    for rank, failure in failures.items():
        data = failure.error_file_data if isinstance(failure.error_file_data, dict) else {}
        if failure.exitcode == stopping.STATUS:
            told.append((0, 0.0, stopping.Stopped()))
        elif "kind" in data:
            kind = getattr(errors, data["kind"], None)
            error = kind(f"{data['message']} (rank {rank})") if kind else RankError(f"rank {rank}: {data['traceback']}")
            told.append((1, data["time"], error))
        elif failure.exitcode == 130:
            told.append((0, 0.0, KeyboardInterrupt()))
        elif failure.exitcode == LOST or failure.exitcode == -signal.SIGTERM:  # the launcher's own
            told.append((3, 0.0, Killed(f"rank {rank} {LOST_ANOTHER}")))
        elif failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            told.append((2, 0.0, Killed(f"rank {rank} was killed by {name}")))
        else:
            told.append((1, 0.0, RankError(f"rank {rank} ended itself with status {failure.exitcode}")))
    return min(told, key=lambda one: one[:2])[2]


def tell(error: BaseException, traceback: str, when: float) -> None:
    """Leave an error of this rank to its launcher."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": str(error), "timestamp": str(int(when)), "time": when}
        told |= {"kind": type(error).__name__, "traceback": traceback}
        atomic_write(Path(path), json.dumps(told), durable=False)  # this rank may be ended at any moment
