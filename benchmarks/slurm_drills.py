"""Does a Slurm job that is disturbed end like one that isn't?

    make slurm-test DRILLS=3

Each drill is a sweep of one job: of one process, of two ranks of ZeRO-2 on a node, or of one on each of two nodes. Once
it has a checkpoint, at a moment drawn at random, one of these happens:

    signal       scancel --signal=USR2: Slurm's word that the job will end
    timeout      the time that the job asked for is cut short
    preemption   a job of a partition with a higher priority takes all nodes
    rank         kill -9 of one rank
    python       kill -9 of the process that starts the ranks, or that is the job where there is one
    step, batch  kill -9 of the slurmstepd of the job's step, or of its script
    node         kill -9 of all that one node runs, and of its slurmd, which comes back half a minute later
    client       kill -9 of the command that waits for the job; given again later

Printed are, for each kind and size: drills; how many were begun again (others had ended when it happened); how many
finished (the command's exit status was 0, and DONE is there); how many have the record of an undisturbed run of as many
ranks, but for the clock, and weights that are the same bit for bit; and how many are one MLflow run.
It needs the partitions of tests/slurm/cluster.sh.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from threading import Lock

from kill_drill import differences, environment

RUN = ["stage=ppo", "env=echo", "stage.num_envs=4", "stage.episodes=4", "stage.eval_episodes=0"]
RUN += ["stage.checkpoint_every=1", "prompt.max_reply_tokens=16", "hardware.threads=1", "seed=1"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1"]
LENGTH = 8  # iterations of a drill
LENGTHS = {"timeout": 40, "batch": 40}  # Slurm looks every half minute whose time is over, and what is lost
PATIENCE_S = 400


@dataclass
class Sweep:
    """One job, and the command that waits for it."""

    place: Path  # where the command is given
    name: str
    ranks: str
    length: int  # iterations

    def __post_init__(self) -> None:
        self.client = self.begun()

    def begun(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vlm_agents", "-m", *RUN, *SLURM, *RANKS[self.ranks]]
        command += [f"stage.iterations={self.length}", f"name={self.name}"]
        with open(self.place / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(command, cwd=self.place, env=environment(), stdout=log, stderr=log)

    @property
    def folder(self) -> Path:
        return self.place / f"multirun/{self.name}/ppo"

    def job(self) -> str:
        """Slurm's number of it, while it is queued or runs."""
        command = ["squeue", "-h", "-r", "-o", "%i %o"]
        queue = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return next((line.split()[0] for line in queue.splitlines() if f"/{self.name}/" in line), "")

    def wait(self) -> bool:
        """Until it has its first checkpoint; False where it ended before that, or takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not list(self.folder.glob("0/checkpoints/step_*")) and time.monotonic() < deadline:
            if self.client.poll() is not None:
                return False
            time.sleep(0.05)
        return time.monotonic() < deadline


@dataclass
class Process:
    pid: int
    words: str
    environ: dict[str, str]

    @property
    def node(self) -> str:
        return self.environ.get("SLURMD_NODENAME", "")


def processes() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, environ = ((path / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        pairs = (pair.partition("=") for pair in environ.split("\0"))
        yield Process(int(path.name), words.replace("\0", " ").strip(), {name: value for name, _, value in pairs})


def of_job(sweep: Sweep, part: str = "") -> list[Process]:
    """Its processes on all nodes whose command line has this part."""
    number = raw(sweep.job())
    return [one for one in processes() if one.environ.get("SLURM_JOB_ID") == number and part in one.words]


def kill(victims: Sequence[Process]) -> None:
    if not victims:
        raise LookupError("it has no such process")
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)


def kill_one(part: str) -> Callable[[Sweep], None]:
    return lambda sweep: kill(random.sample([one for one in of_job(sweep, part) if one.words.startswith(PYTHON)], 1))


def kill_stepd(step: str) -> Callable[[Sweep], None]:
    """The slurmstepd of one node."""

    def deed(sweep: Sweep) -> None:
        title = f"slurmstepd: [{raw(sweep.job())}.{step}]"
        kill(random.sample([one for one in processes() if one.words.startswith(title)], 1))

    return deed


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def squeue(what: str, job: str) -> str:
    command = ["squeue", "-h", "-r", "-o", what, "-j", job]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def raw(job: str) -> str:
    """The number by which Slurm's own processes call it."""
    return squeue("%A", job)


def lose_node(sweep: Sweep) -> None:
    """Kill its slurmd, and all that it runs, of other drills too; half a minute later it is back, as after a reboot."""
    with NODES:  # one at a time
        node = random.choice(sorted({one.node for one in of_job(sweep)}))
        there = list(processes())
        mine = [one for one in there if one.node == node]
        parents = {int(Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[1]) for one in mine}
        alike = [one for one in there if one.words.startswith("slurmstepd: [") and one.pid in parents]
        kill([*(one for one in there if one.words.endswith(f"slurmd -N {node}")), *alike, *mine])
        time.sleep(30)
        slurm("slurmd", "-N", node)
        time.sleep(5)


def shorten(sweep: Sweep) -> None:
    """Have its time be over in the next minute or two; Slurm tells it, and ends it. Then it has what it asked for."""
    job, asked = sweep.job(), squeue("%l", sweep.job())
    hours, minutes, seconds = map(int, ("0:0:" + squeue("%M", job)).split(":")[-3:])
    limit = hours * 60 + minutes + (1 if seconds < 15 else 2)
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    deadline = time.monotonic() + PATIENCE_S
    while squeue("%T", job) == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    if squeue("%T", job):
        slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={asked}")


def kill_client(sweep: Sweep) -> None:
    sweep.client.send_signal(signal.SIGKILL)
    sweep.client.wait()
    time.sleep(random.choice((0.0, 40.0)))  # given again while the job goes on, or when it has ended
    sweep.client = sweep.begun()


NODES = Lock()
PYTHON = sys.executable  # srun's command line has the same words, later
DEEDS: dict[str, Callable[[Sweep], None]] = {
    "signal": lambda sweep: slurm("scancel", "--signal=USR2", sweep.job()),
    "timeout": shorten,
    "preemption": lambda sweep: slurm("sbatch", "-p", "high", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 3"),
    "rank": kill_one("vlm_agents.worker"),
    "python": kill_one("submitit.core._submit"),
    "step": kill_stepd("0"),
    "batch": kill_stepd("batch"),
    "node": lose_node,
    "client": kill_client,
}
RANKS = {
    "1": [],
    "2": ["hardware.processes=2", "hardware.zero=2"],
    "2 nodes": ["hardware.nodes=2", "hardware.processes=1", "hardware.zero=2"],
}


@dataclass
class End:
    disturbed: bool  # it was begun again, or the command was
    finished: bool
    equal: bool
    one_run: bool


def drill(place: Path, ranks: str, kind: str, number: int) -> End:
    name = f"{kind}_{ranks.replace(' ', '_')}_{number}"
    sweep = Sweep(place, name, ranks, LENGTHS.get(kind, LENGTH))
    if sweep.wait():
        time.sleep(random.Random(name).uniform(0, 3))
        try:
            DEEDS[kind](sweep)
        except (subprocess.CalledProcessError, LookupError, ValueError, OSError) as error:
            print(f"{name}: not done, {error}", flush=True)
    try:
        status = sweep.client.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        sweep.client.kill()
        slurm("scancel", sweep.job())
        status = "none"
    logs = "".join(path.read_text() for path in (sweep.folder / ".submitit").glob("*_0_log.*"))
    begun, again = logs.count("Loading pickle"), logs.count("all ranks begin again")
    differing = list(differences(place / f"multirun/{unbroken(ranks, sweep.length)}/ppo/0", sweep.folder / "0"))
    runs = mlflow_runs(place, name)
    print(
        f"{name:<18} status {status}, begun {begun} times, ranks again {again}, differs: {differing[:4]}, {runs}",
        flush=True,
    )
    return End(
        begun + again > 1 or kind == "client",
        status == 0 and (sweep.folder / "0/DONE").exists(),
        not differing,
        runs == [("ppo", "FINISHED"), ("ppo/0", "FINISHED")],
    )


def disturb_nothing(place: Path, ranks: str, length: int) -> None:
    sweep = Sweep(place, unbroken(ranks, length), ranks, length)
    if sweep.client.wait():
        sys.exit(f"the undisturbed run failed: see {place}/{sweep.name}.log")


def unbroken(ranks: str, length: int) -> str:
    """The name of the sweep that isn't disturbed."""
    return f"unbroken_{ranks.replace(' ', '_')}_{length}"


def mlflow_runs(place: Path, name: str) -> list[tuple[str, str]]:
    """Name and status of the sweep's run and of those in it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    infos = [run.info for run in client.search_runs(experiments, max_results=1000)]
    names = [(str(info.run_name), str(info.status)) for info in infos]
    return sorted((own.removeprefix(f"{name}/"), end) for own, end in names if own.startswith(f"{name}/"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Does a Slurm job that is disturbed end like one that isn't?")
    parser.add_argument("--drills", type=int, default=3, help="of each kind, for each number of ranks")
    parser.add_argument("--jobs", type=int, default=2, help="drills at a time")
    parser.add_argument("--folder", type=Path, help="where to run; kept. Default: a temporary one")
    parser.add_argument("--ranks", nargs="*", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"{', '.join(DEEDS)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.kinds) - DEEDS.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        kinds, rows = args.kinds or list(DEEDS), []
        with ThreadPoolExecutor(args.jobs) as pool:
            sizes = product(args.ranks, sorted({LENGTHS.get(kind, LENGTH) for kind in kinds}))
            list(pool.map(lambda size: disturb_nothing(place, *size), sizes))
            for kind in kinds:
                # of one process, the rank is the python
                sizes = [ranks for ranks in args.ranks if (kind, ranks) != ("rank", "1")]
                ends = [
                    (ranks, pool.submit(drill, place, ranks, kind, n)) for ranks in sizes for n in range(args.drills)
                ]
                for ranks in sizes:
                    mine = [astuple(end.result()) for size, end in ends if size == ranks]
                    rows.append((kind, ranks, len(mine), *map(sum, zip(*mine, strict=True))))
                    print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
        print("| kind | ranks | drills | begun again | finished | record and weights equal | one MLflow run |")
        print("|---" * 7 + "|")
        for row in rows:
            print("| " + " | ".join(map(str, row)) + " |")
    return 0 if all(row[2:] == (row[2],) * 5 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
