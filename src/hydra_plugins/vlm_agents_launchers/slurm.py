"""Jobs of a sweep as a Slurm array."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.vlm_agents_launchers.side_by_side import GRACE_S, POLL_S, Overrides, SideBySide, told

ASKED = "partition", "nodes", "ntasks_per_node", "cpus_per_task", "gpus_per_node", "gres", "mem", "time"  # of sbatch
ASK_S = 10  # between two questions to Slurm, which has others to answer
SBATCH = {"name": "job_name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks_per_node"}
# Slurm queues a job again that was preempted or whose node is lost, and submitit one that was told of its end. Nobody
# does that for one whose process was killed, by the kernel for its memory or by hand, or with its slurmstepd, of which
# srun says 0. A job that is cancelled, or being queued again, isn't RUNNING any more; and what has a result needs no
# second try: where one node of several fails, the others are killed.
KILLED = """\
status=$?
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}
if ! ls {folder}/${{job}}_*_result.pkl &> /dev/null && [ "$(squeue -h -j $SLURM_JOB_ID -o %T)" = RUNNING ]; then
  echo $status >> {folder}/$SLURM_JOB_ID.killed
  [ $(wc -l < {folder}/$SLURM_JOB_ID.killed) -le {times} ] && scontrol requeue $SLURM_JOB_ID && sleep 60
fi
exit $status"""


class SlurmLauncher(SideBySide):
    """Jobs of one Slurm array, by submitit. A job that ends too early goes on in the same directory.

    The same command, given while jobs of an earlier one are still queued or running, waits for those."""

    def resources(self, config: DictConfig) -> Mapping[str, Any]:
        """All that is in conf/hydra/launcher/slurm.yaml, most of which follows from the job's hardware."""
        return OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[return-value] - a mapping

    def prepare(self) -> None:
        self.executor()

    def executor(self) -> Any:
        """submitit's; ConfigError where there is no Slurm, or a parameter isn't one."""
        from vlm_agents.errors import ConfigError

        if shutil.which("sbatch") is None:
            raise ConfigError("hydra/launcher=slurm: there is no sbatch here; give the command on a machine of a Slurm")
        return executor(self.given, self.folder)

    def __call__(self, overrides: Overrides, number: int, state: dict[type, Any]) -> JobReturn:
        """A job that fails raises what stopped it: then Slurm sees that too, and ends the other nodes of the job. One
        whose slurmstepd is killed ends with it: Slurm knows nothing of it any more, and lets it be begun again."""
        from vlm_agents import stopping
        from vlm_agents.processes import end_with_parent

        end_with_parent(signal.SIGKILL)  # submitit bypasses SIGTERM
        stopping.grace = 0.75 * self.given["signal_delay_s"]  # the rest is for being queued again
        job = super().__call__(overrides, number, state)
        return job if job.status is JobStatus.COMPLETED else job.return_value

    def checkpoint(self, *args: Any) -> Any:
        """For submitit: what a job that is queued again shall call."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        import submitit

        executor, nodes = self.executor(), self.given["nodes"]
        names = under_way(executor.folder, jobs)
        if new := [number for number in jobs if number not in names]:
            state = Singleton.get_state()
            made = submitted(executor, self, [(jobs[number], number, state) for number in new])
            names |= {number: job.job_id for number, job in zip(new, made, strict=True)}
        running = {number: submitit.SlurmJob(executor.folder, name) for number, name in names.items()}
        for number, job in sorted(running.items()):
            print(f"job {number}: Slurm's {job.job_id}, {told(jobs, number)}; {job.paths.stderr}", flush=True)
        try:
            queue, asked, begun = dict.fromkeys(names.values(), ""), time.monotonic(), set[int]()
            while running:
                if time.monotonic() > asked + ASK_S:
                    queue, asked = queued(names.values()), time.monotonic()
                    begun |= {number for number, name in names.items() if queue.get(name) == "RUNNING"}
                    for number in [number for number in begun if queue.get(names[number]) == "PENDING"]:
                        print(f"job {number} is queued again", flush=True)
                        begun.remove(number)
                for number, job in [(number, job) for number, job in running.items() if ended(job, nodes, queue)]:
                    del running[number]
                    yield number, failure(job, nodes)
                time.sleep(POLL_S)
            release(names.values())
        except KeyboardInterrupt:
            left = " ".join(job.job_id for job in running.values())
            print(
                f"the jobs go on in Slurm: the same command waits for them, scancel {left} ends them", file=sys.stderr
            )
            raise


def under_way(folder: Path, jobs: Mapping[int, Overrides]) -> dict[int, str]:
    """Of these jobs those that Slurm has already, of an earlier command: its name for each.

    No note of ours says so, before which the command could have been killed: Slurm knows where a job's script lies, and
    beside that is what submitit was given to do. A job without that, whose command was killed in the very moment, ends
    for want of it after some minutes."""
    import submitit

    from vlm_agents.errors import ConfigError

    done = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %o"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"hydra/launcher=slurm: Slurm doesn't answer now ({' '.join(done.stderr.split())}): try later"
        )
    found = {}
    for line in done.stdout.splitlines():
        name, _, script = line.partition(" ")
        job = submitit.SlurmJob(folder, name)
        if Path(script).parent == folder and job.paths.submitted_pickle.exists():
            overrides, number, _ = job.submission().args
            if sorted(overrides) == sorted(jobs.get(number, ())):
                found[number] = name
    return found


def tasks(job: Any, nodes: int) -> list[Any]:
    """Its process on each node, as submitit knows a job; `job` itself stands for that on the first."""
    return [type(job)(job.paths.folder, job.job_id, [number]) for number in range(nodes)]


def ended(job: Any, nodes: int, queue: Collection[str]) -> bool:
    """Has it all its results, or left the queue without? One that is being queued again stays there; submitit, which
    asks for its state, takes it for ended."""
    return job.job_id not in queue or all(task.paths.result_pickle.exists() for task in tasks(job, nodes))


def release(names: Collection[str]) -> None:
    """Give back what Slurm still holds for jobs that have ended: it doesn't see that where its process was killed."""
    deadline = time.monotonic() + GRACE_S
    while (held := queued(names)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if held:
        subprocess.run(["scancel", *sorted(held)], check=False)


def executor(params: Mapping[str, Any], sweep: Path) -> Any:
    """submitit's, which makes no folder before it submits; ConfigError where a parameter isn't one."""
    import submitit

    from vlm_agents.errors import ConfigError

    class Anywhere(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # a script can be made without a Slurm
            return 2

    if (minutes := params["timeout_min"]) * 60 <= (warning := params["signal_delay_s"]):
        raise ConfigError(
            f"hydra.launcher.timeout_min={minutes} is over before a job's warning, signal_delay_s={warning} s, could "
            "come: each start would be stopped at once. Give it more time"
        )
    own = ("_target_", "max_num_killed", "max_num_timeout")
    folder = (sweep / ".submitit").absolute()
    killed = KILLED.format(folder=shlex.quote(str(folder)), times=params["max_num_killed"])
    given = {SBATCH.get(name, name): value for name, value in params.items() if name not in own and value is not None}
    given |= {"mem": f"{given['mem']}GB"} if "mem" in given else {}
    made = Anywhere(folder, max_num_timeout=params["max_num_timeout"])
    try:
        made.update_parameters(**given, teardown=killed.splitlines())
    except ValueError as error:
        said = str(error).splitlines()[0]
        others = "what else sbatch takes goes into hydra.launcher.additional_parameters"
        raise ConfigError(f"hydra/launcher=slurm: {said}; {others}") from error
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
        asked = " ".join(f"{name}={executor.parameters[name]}" for name in ASKED if executor.parameters.get(name))
        raise ConfigError(
            f"sbatch refused the jobs, and none was begun: {said}. Each asks for {asked}: hardware.nodes, "
            "hardware.processes and hardware.threads, or hydra.launcher.<name>, change that"
        ) from error


def queued(names: Collection[str]) -> dict[str, str]:
    """The state of those of these Slurm jobs that wait or run; all of them, in an unknown one, while Slurm doesn't
    answer."""
    command = ["squeue", "-h", "-r", "-o", "%i %T", "-j", ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return dict.fromkeys(names, "")
    states = dict(line.split() for line in done.stdout.splitlines())
    return {name: state for name, state in states.items() if name in names}


def failure(job: Any, nodes: int) -> Exception | None:
    """What stopped a Slurm job that has ended. Where it was one of its nodes, others have just lost it: some say so,
    and others tell of it whatever a library made of that, later than the one that it was."""
    from vlm_agents.errors import VlmAgentsError
    from vlm_agents.launch import LOST_ANOTHER

    told = [task for task in tasks(job, nodes) if task.paths.result_pickle.exists()]
    told.sort(key=lambda task: task.paths.result_pickle.stat().st_mtime_ns)
    errors = [error for task in told if (error := raised(task))]
    if errors:
        return min(errors, key=lambda error: LOST_ANOTHER in str(error))
    if len(told) == nodes:
        return None
    return VlmAgentsError(f"ended before its time, and isn't queued any more: see {job.paths.stderr}")


def raised(task: Any) -> Exception | None:
    """Of the process on one node, whose traceback submitit has written down."""
    from vlm_agents.errors import VlmAgentsError

    outcome, result = task._get_outcome_and_result()
    if outcome == "success":
        return None
    ours = r"^(?:vlm_agents\.errors\.\w+|submitit\.core\.utils\.UncompletedJobError): "
    _, *told = re.split(ours, result, flags=re.MULTILINE)
    return VlmAgentsError(told[-1]) if told else RuntimeError(f"{result.splitlines()[-1]}; {task.paths.stderr}")
