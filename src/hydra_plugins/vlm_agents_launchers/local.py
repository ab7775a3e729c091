"""Jobs of a sweep as processes of this machine. As a program: one such job."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus

from hydra_plugins.vlm_agents_launchers.side_by_side import GRACE_S, POLL_S, Overrides, SideBySide, told


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

        from vlm_agents.processes import end_with_parent

        self.log(number).parent.mkdir(exist_ok=True)
        with open(self.log(number), "ab") as log:
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
