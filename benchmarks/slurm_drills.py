"""Does a Slurm job that is disturbed end like one that isn't?

    make slurm-test DRILLS=10

Each drill is a sweep of one job. Once it has a checkpoint, at a moment drawn at random, one of these happens:

    signal       scancel --signal=USR2: Slurm's word that the job will end
    timeout      the time that the job asked for is over, as often as it takes
    preemption   a job of a partition with a higher priority takes all nodes
    python       kill -9 of the job's process
    step, batch  kill -9 of the slurmstepd of the job's step, or of its script
    client       kill -9 of the command that waits for the job; given again later

Printed are, for each kind: drills; how many finished (the command's exit status was 0, and DONE is there); how many
have the record of an undisturbed run, but for the clock, and weights that are the same bit for bit; and how many are
one MLflow run. It needs the partitions of tests/slurm/cluster.sh.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kill_drill import differences, environment

RUN = ["stage=ppo", "env=echo", "stage.iterations=20", "stage.num_envs=4", "stage.episodes=4", "stage.eval_episodes=4"]
RUN += ["stage.checkpoint_every=1", "prompt.max_reply_tokens=16", "hardware.threads=1", "seed=1"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1"]
# Within ten minutes of its end submitit takes any signal for the end of a job's time.
SHORT = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=32", "hydra.launcher.max_num_timeout=30"]
PATIENCE_S = 400


@dataclass
class Sweep:
    """One job, and the command that waits for it."""

    place: Path  # where the command is given
    name: str
    words: Sequence[str]

    def __post_init__(self) -> None:
        self.client = self.begun()

    def begun(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vlm_agents", "-m", *RUN, *SLURM, *self.words, f"name={self.name}"]
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


def ids(pattern: str) -> list[int]:
    """Processes whose command line begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if words.startswith(pattern):
            found.append(int(path.parent.name))
    return found


def kill(pattern: str) -> None:
    for pid in ids(pattern):
        subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def kill_client(sweep: Sweep) -> None:
    sweep.client.send_signal(signal.SIGKILL)
    sweep.client.wait()
    time.sleep(random.choice((0.0, 60.0)))  # given again while the job goes on, or when it has ended
    sweep.client = sweep.begun()


DEEDS: dict[str, Callable[[Sweep], None]] = {
    "signal": lambda sweep: slurm("scancel", "--signal=USR2", sweep.job()),
    "timeout": lambda sweep: None,
    "preemption": lambda sweep: slurm("sbatch", "-p", "high", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 3"),
    "python": lambda sweep: kill(f"{sys.executable} -u -m submitit.core._submit {sweep.folder}/"),
    "step": lambda sweep: kill(f"slurmstepd: [{raw(sweep.job())}.0]"),
    "batch": lambda sweep: kill(f"slurmstepd: [{raw(sweep.job())}.batch]"),
    "client": kill_client,
}


def raw(job: str) -> str:
    """The number by which Slurm's own processes call it."""
    command = ["squeue", "-h", "-r", "-o", "%A", "-j", job]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def drill(place: Path, unbroken: Path, kind: str, number: int) -> tuple[bool, bool, bool]:
    """Was the job finished, equal to the unbroken one, and one run of MLflow?"""
    rng = random.Random(f"{kind} {number}")
    sweep = Sweep(place, f"{kind}_{number}", SHORT if kind == "timeout" else [])
    if sweep.wait():
        time.sleep(rng.uniform(0, 4))
        try:
            DEEDS[kind](sweep)
        except subprocess.CalledProcessError:
            print(f"{sweep.name}: the job ended before that", flush=True)
    try:
        status = sweep.client.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        sweep.client.kill()
        status = "none"
    finished = status == 0 and (sweep.folder / "0/DONE").exists()
    differing = list(differences(unbroken, sweep.folder / "0"))
    starts = (place / f"multirun/{sweep.name}/ppo/.submitit").glob("*_log.out")
    begun = sum(path.read_text().count("Loading pickle") for path in starts)
    runs = mlflow_runs(place, sweep.name)
    print(f"{sweep.name:<14} status {status}, begun {begun} times, differs: {differing}, MLflow: {runs}", flush=True)
    return finished, not differing, runs == [("ppo", "FINISHED"), ("ppo/0", "FINISHED")]


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
    parser.add_argument("--drills", type=int, default=10, help="of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="drills at a time")
    parser.add_argument("--folder", type=Path, help="where to run; kept. Default: a temporary one")
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"{', '.join(DEEDS)}; default: all")
    args = parser.parse_args()
    if unknown := set(args.kinds) - DEEDS.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if Sweep(place, "unbroken", []).client.wait():
            sys.exit(f"the undisturbed run failed: see {place}/unbroken.log")
        unbroken, rows = place / "multirun/unbroken/ppo/0", []
        with ThreadPoolExecutor(args.jobs) as pool:
            for kind in args.kinds or list(DEEDS):
                ends = list(pool.map(partial(drill, place, unbroken, kind), range(args.drills)))
                rows.append((kind, len(ends), *(sum(column) for column in zip(*ends, strict=True))))
        print("| kind | drills | finished | record and weights equal | one MLflow run |\n|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(map(str, row)) + " |")
    return 0 if all(row[1:] == (row[1],) * 4 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
