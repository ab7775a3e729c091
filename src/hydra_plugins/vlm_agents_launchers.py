"""Jobs of a sweep side by side, as Slurm jobs or as processes of this machine. Hydra looks for launchers here.

Hydra's own launcher runs one job after another in the process of the command line. Here each job has a process, to
which the launcher goes as a pickle. The command waits for all of them, whatever becomes of one.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

Overrides = Sequence[str]
POLL_S = 1.0
GRACE_S = 30  # that a process, or a Slurm job, has to end in


class SideBySide(Launcher):
    """What both launchers have in common. `start` and what follows it is theirs."""

    def __init__(self, **params: Any) -> None:
        self.params: dict[str, Any] = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in params.items()
        }

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config  # a vlm_agents.command_line.Jobs

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Overrides], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs. Those that are finished, or can't be composed, are told of here and not started."""
        setup_globals()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.sweeps.setdefault(self.folder, [])
        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        settings = {number: self.settings(overrides, number) for number, overrides in jobs.items()}
        started = {n: words for n, words in jobs.items() if settings[n] and not (self.folder / f"{n}/DONE").exists()}
        for number in jobs.keys() - started.keys():
            self.run(jobs[number], number)
        if started:
            from vlm_agents import tracking

            self.prepare()
            tracking.begin_sweep(next(filter(None, settings.values())), self.folder)
            for number, error in self.results(started):
                self.task.tell(self.folder, number, error)
        return []  # the task knows how each ended

    def prepare(self) -> None:
        """Raise what is wrong with this launcher, before anything is made."""

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        """Run the jobs; each one's number as it ends, and what stopped it."""
        raise NotImplementedError

    def composed(self, overrides: Overrides, number: int) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def settings(self, overrides: Overrides, number: int) -> dict[str, Any] | None:
        """A job's settings as nested dictionaries; None where they are refused, which the job itself will tell."""
        from vlm_agents.config import parse
        from vlm_agents.hydra_errors import REFUSALS

        before = HydraConfig.instance().cfg
        try:
            config = self.composed(overrides, number)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            return asdict(parse(config))
        except REFUSALS:
            return None
        finally:
            HydraConfig.instance().cfg = before

    def run(self, overrides: Overrides, number: int) -> JobReturn:
        """Run a job in this process."""
        keys: dict[str, Any] = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
        config = self.composed(overrides, number)
        return run_job(hydra_context=self.context, task_function=self.task, config=config, **keys)

    def __call__(self, overrides: Overrides, number: int, state: dict[type, Any]) -> JobReturn:
        """The same in another process, to which Hydra's `state` came along."""
        Singleton.set_state(state)
        setup_globals()
        return self.run(overrides, number)


def told(jobs: Mapping[int, Overrides], number: int) -> str:
    """The overrides that not all jobs have."""
    common = set.intersection(*map(set, jobs.values())) if len(jobs) > 1 else set()
    return " ".join(filter_overrides([word for word in jobs[number] if word not in common]))


# ---- Slurm -----------------------------------------------------------------------------------------------------------
SBATCH = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
# Slurm queues a job again that was preempted or whose node is lost, and submitit one that was told of its end. Nobody
# does that for one whose process was killed, by the kernel for its memory or by hand. A job that is cancelled, or being
# queued again, isn't RUNNING any more.
KILLED = """\
status=$?
if [ $status -eq 137 ] || [ $status -eq 139 ] && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  echo $status >> {folder}/$SLURM_JOB_ID.killed
  [ $(wc -l < {folder}/$SLURM_JOB_ID.killed) -le {times} ] && scontrol requeue $SLURM_JOB_ID && sleep 60
fi
exit $status"""


class SlurmLauncher(SideBySide):
    """Jobs of one Slurm array, by submitit. A job that ends too early goes on in the same directory.

    The same command, given while jobs of an earlier one are still queued or running, waits for those."""

    def prepare(self) -> None:
        self.executor()

    def executor(self) -> Any:
        """submitit's; ConfigError where there is no Slurm, or a parameter isn't one."""
        from vlm_agents.errors import ConfigError

        if shutil.which("sbatch") is None:
            raise ConfigError("hydra/launcher=slurm: there is no sbatch here; give the command on a machine of a Slurm")
        return executor(self.params, self.folder)

    def checkpoint(self, *args: Any) -> Any:
        """For submitit: what a job that is queued again shall call."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        import submitit

        executor = self.executor()
        note = executor.folder / "jobs.json"  # the Slurm job of each
        known = json.loads(note.read_text()) if note.exists() else {}
        going = {number: known[str(number)] for number in jobs if known.get(str(number)) in queued(known.values())}
        running = {number: submitit.SlurmJob(executor.folder, name) for number, name in going.items()}
        if new := [number for number in jobs if number not in going]:
            state = Singleton.get_state()
            made = submitted(executor, self, [(jobs[number], number, state) for number in new])
            running |= zip(new, made, strict=True)
            note.write_text(json.dumps(known | {str(number): job.job_id for number, job in running.items()}))
        for number, job in sorted(running.items()):
            print(f"job {number}: Slurm's {job.job_id}, {told(jobs, number)}; {job.paths.stdout}", flush=True)
        names = [job.job_id for job in running.values()]
        try:
            while running:
                for number, job in [(number, job) for number, job in running.items() if ended(job)]:
                    del running[number]
                    yield number, failure(job)
                time.sleep(POLL_S)
            release(names)
        except KeyboardInterrupt:
            left = " ".join(job.job_id for job in running.values())
            print(f"the jobs go on in Slurm, which scancel {left} ends", file=sys.stderr)
            raise


def ended(job: Any) -> bool:
    """Has it a result, or left the queue without? submitit also takes one for ended that is just being queued again."""
    return job.paths.result_pickle.exists() or (job.done() and job.job_id not in queued([job.job_id]))


def release(names: Sequence[str]) -> None:
    """Give back what Slurm still holds for jobs that have ended: it doesn't see that where its process was killed."""
    deadline = time.monotonic() + GRACE_S
    while (held := queued(names)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if held := held & set(names):
        subprocess.run(["scancel", *sorted(held)], check=False)


def executor(params: Mapping[str, Any], sweep: Path) -> Any:
    """submitit's, which makes no folder before it submits; ConfigError where a parameter isn't one."""
    import submitit

    from vlm_agents.errors import ConfigError

    class Anywhere(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # a script can be made without a Slurm
            return 2

    own = ("_target_", "max_num_killed", "max_num_timeout")
    folder = (sweep / ".submitit").absolute()
    killed = KILLED.format(folder=shlex.quote(str(folder)), times=params["max_num_killed"])
    given = {SBATCH.get(name, name): value for name, value in params.items() if name not in own and value is not None}
    given |= {"mem": f"{given['mem']}GB"} if "mem" in given else {}
    made = Anywhere(folder, max_num_timeout=params["max_num_timeout"])
    try:
        made.update_parameters(**given, teardown=killed.splitlines())
    except ValueError as error:
        raise ConfigError(f"hydra/launcher=slurm: {str(error).splitlines()[0]}") from error
    return made


def script(params: DictConfig, sweep: Path, jobs: int) -> str:
    """What sbatch would be given."""
    made = executor(OmegaConf.to_container(params, resolve=True), sweep)  # type: ignore[arg-type] - a mapping
    if jobs > 1:
        made.parameters["map_count"] = jobs
    return made._make_submission_file_text(made._submitit_command_str, "")


def submitted(executor: Any, function: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from vlm_agents.errors import ConfigError

    try:
        return executor.map_array(function, *zip(*arguments, strict=True))
    except (FailedSubmissionError, FailedJobError, subprocess.CalledProcessError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"Slurm took no job: {said}") from error


def queued(names: Iterable[str]) -> set[str]:
    """Those of these Slurm jobs that wait or run."""
    command = ["squeue", "-h", "-r", "-o", "%i", "-j", ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split())


def failure(job: Any) -> Exception | None:
    """What stopped a Slurm job that has ended."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    from vlm_agents.errors import VlmAgentsError

    try:
        result = job.result()
    except (UncompletedJobError, FailedJobError):
        return VlmAgentsError(f"ended before its time, and isn't queued any more: {job.paths.stderr}")
    if result.status is JobStatus.COMPLETED:
        return None
    return result._return_value  # return_value would raise it


# ---- this machine ----------------------------------------------------------------------------------------------------
class LocalLauncher(SideBySide):
    """Processes of this machine, `jobs` of them at once. What each says goes into a file."""

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        from vlm_agents.__main__ import terminate

        before = signal.signal(signal.SIGHUP, terminate)  # the terminal's end is that of all jobs too
        waiting, running = list(jobs), dict[int, tuple[int, subprocess.Popen[bytes]]]()
        limit = min(int(self.params["jobs"]), len(jobs))
        places = [*range(limit)]
        try:
            while waiting or running:
                while waiting and places:
                    number, place = waiting.pop(0), places.pop(0)
                    print(f"job {number} begins: {told(jobs, number)}; {self.log(number)}", flush=True)
                    running[number] = place, self.started(jobs[number], number, self.environment(place, limit))
                for number, (place, process) in [*running.items()]:
                    if process.poll() is not None:
                        del running[number]
                        places.append(place)
                        yield number, self.failure(number, process.returncode)
                time.sleep(POLL_S / 10)
        finally:
            end([process for _, process in running.values()])
            signal.signal(signal.SIGHUP, before)

    def log(self, number: int) -> Path:
        return self.folder / f"logs/{number}.log"

    def started(self, overrides: Overrides, number: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        import cloudpickle

        self.log(number).parent.mkdir(exist_ok=True)
        with open(self.log(number), "ab") as log:
            command = [sys.executable, "-m", __name__]
            # a group of its own: Ctrl-C comes from here, once
            process = subprocess.Popen(
                command, env=env, process_group=0, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            cloudpickle.dump((self, (overrides, number, Singleton.get_state())), pipe)
        return process

    def environment(self, place: int, limit: int) -> dict[str, str]:
        """What a job sees of the machine: its share of the cores, and GPUs of its own where there are enough."""
        from vlm_agents.cores import affinity

        env = {"OMP_NUM_THREADS": str(max(1, len(affinity()) // limit)), **os.environ}
        hardware = self.config.hardware
        if hardware.device == "cuda" and len(found := gpus()) >= limit * hardware.processes:
            mine = found[place * hardware.processes :][: hardware.processes]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return env

    def failure(self, number: int, status: int) -> Exception | None:
        from vlm_agents.errors import VlmAgentsError

        if not status:
            return None
        lines = self.log(number).read_text(errors="replace").splitlines()
        said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return VlmAgentsError(said if status == 2 and said else f"{how}; see {self.log(number)}")


def gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have them end as by SIGTERM, resumable; kill those that don't."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def main(stream: IO[bytes]) -> int:
    """Run the job that a LocalLauncher wrote to `stream`; the exit status."""
    import cloudpickle

    from vlm_agents.__main__ import terminate
    from vlm_agents.errors import VlmAgentsError

    signal.signal(signal.SIGTERM, terminate)
    try:
        launcher, arguments = cloudpickle.load(stream)
        job = launcher(*arguments)
    except KeyboardInterrupt:
        print("terminated; the same command with the run's name= continues it", flush=True)
        return 143
    error = None if job.status is JobStatus.COMPLETED else job._return_value
    if error and not isinstance(error, VlmAgentsError):
        traceback.print_exception(error)
    return 0 if error is None else 2 if isinstance(error, VlmAgentsError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
