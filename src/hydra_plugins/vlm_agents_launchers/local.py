"""Jobs of a sweep as processes of this machine. As a program: one such job."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus
from omegaconf import DictConfig

from hydra_plugins.vlm_agents_launchers.side_by_side import GRACE_S, POLL_S, Overrides, SideBySide, told


class Started(NamedTuple):
    """A job under way."""

    place: int  # among those that run at once
    process: subprocess.Popen[bytes]
    log_start: int  # the first byte of its log that is its own


class LocalLauncher(SideBySide):
    """Processes of this machine, `jobs` of them at once. What each says goes into a file."""

    def resources(self, config: DictConfig) -> Mapping[str, Any]:
        """GPUs of its own; none for one that is to be on the CPU, or on a GPU that its settings name."""
        hardware = config.hardware
        return {"GPUs": hardware.processes if hardware.device == "cuda" else 0}

    def prepare(self) -> None:
        from vlm_agents.errors import ConfigError

        jobs = self.params["jobs"]
        if not isinstance(jobs, int) or jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs={jobs} is how many jobs run at once: a number from 1")

    def results(self, jobs: Mapping[int, Overrides]) -> Iterator[tuple[int, Exception | None]]:
        from vlm_agents import stopping
        from vlm_agents.processes import end

        waiting, running = list(jobs), dict[int, Started]()
        limit = min(self.params["jobs"], len(jobs))
        places = [*range(limit)]

        def pass_on(number: int, frame: FrameType | None) -> None:
            stopping.note(number, frame)
            for job in running.values():
                job.process.send_signal(number)

        before = signal.signal(signal.SIGUSR2, pass_on)
        try:
            while running or (waiting and not stopping.asked()):
                while waiting and places and not stopping.asked():
                    number, place = waiting.pop(0), places.pop(0)
                    print(f"job {number} begins: {told(jobs, number)}; {self.log(number)}", flush=True)
                    running[number] = self.started(jobs[number], number, place, self.environment(place, limit))
                for number, job in [*running.items()]:
                    if job.process.poll() is not None:
                        del running[number]
                        places.append(job.place)
                        if job.process.returncode == stopping.STATUS:
                            continue
                        yield number, self.failure(number, job.process.returncode, job.log_start)
                time.sleep(POLL_S / 10)
            if stopping.asked():
                raise stopping.Stopped
        finally:
            end([job.process for job in running.values()], GRACE_S)
            signal.signal(signal.SIGUSR2, before)

    def log(self, number: int) -> Path:
        return self.folder / f"logs/{number}.log"

    def started(self, overrides: Overrides, number: int, place: int, env: Mapping[str, str]) -> Started:
        import cloudpickle

        from vlm_agents.processes import end_with_parent

        self.log(number).parent.mkdir(exist_ok=True)
        with open(self.log(number), "ab") as log:  # behind what an earlier command's job said
            start = log.tell()
            command = [sys.executable, "-m", __name__]
            # a group of its own: Ctrl-C comes from here, once
            process = subprocess.Popen(
                command,
                env=env,
                process_group=0,
                preexec_fn=end_with_parent,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            cloudpickle.dump((self, (overrides, number, Singleton.get_state())), pipe)
        return Started(place, process, start)

    def environment(self, place: int, limit: int) -> dict[str, str]:
        """What a job sees of the machine: its share of the cores, and GPUs of its own where there are enough."""
        from vlm_agents.cores import affinity

        env = {"OMP_NUM_THREADS": str(max(1, len(affinity()) // limit)), **os.environ}
        if (count := self.given["GPUs"]) and len(found := gpus()) >= limit * count:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(found[place * count :][:count])
        return env

    def failure(self, number: int, status: int, log_start: int) -> Exception | None:
        """What stopped a job that ended with this status, as it said behind that byte of its log."""
        from vlm_agents.errors import VlmAgentsError

        if not status:
            return None
        lines = self.log(number).read_bytes()[log_start:].decode(errors="replace").splitlines()
        said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if status == 2 and said:
            return VlmAgentsError(said)
        kind = RuntimeError if status == 1 else VlmAgentsError  # a bug, which the log tells whole
        return kind(f"{how}; see {self.log(number)}")


def gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def main(stream: IO[bytes]) -> int:
    """Run the job that a LocalLauncher wrote to `stream`; the exit status."""
    import cloudpickle

    from vlm_agents.__main__ import heed_signals, say_why
    from vlm_agents.errors import VlmAgentsError

    heed_signals()
    try:
        launcher, arguments = cloudpickle.load(stream)
        job = launcher(*arguments)
    except KeyboardInterrupt as stop:
        return say_why(stop)
    error = None if job.status is JobStatus.COMPLETED else job._return_value
    if error and not isinstance(error, VlmAgentsError):
        traceback.print_exception(error)
    return 0 if error is None else 2 if isinstance(error, VlmAgentsError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
