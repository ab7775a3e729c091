"""How many threads a run takes: what limits them, read from files as the kernel writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_agents import cores
from vlm_agents.env_pool import EnvPool
from vlm_agents.types import Observation, Step

STAT = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 1000 7 1 2 3 0 0\ncpu1 900 0 0 1000 0 0 0 0 0 0\nintr 1 2\n"


class ThreadsEnv:
    """Tells in an observation how many threads its process may have."""

    name, instructions = "threads", ""

    def reset(self, seed: int) -> Observation:
        return Observation(" ".join(os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")), (), ("a",))

    def step(self, action: str | None) -> Step:
        raise NotImplementedError

    def close(self) -> None: ...


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_time_that_cpus_were_busy(tmp_path: Path):
    """Neither idle (1000) nor waiting for a disk (7): 100 + 20 + 30 + 1 + 2 + 3 hundredths of a second."""
    root = files(tmp_path, {"proc/stat": STAT})
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert cores._busy({0}, root) == pytest.approx(156 * tick)
    assert cores._busy({0, 1}, root) == pytest.approx(1056 * tick)
    assert cores._busy({0}, tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    ("contents", "quotas"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, [1.5]),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, []),
        (  # version 1, in a container that sees its own group as the root
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [4.0],
        ),
        ({"proc/self/cgroup": "5:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, []),
        ({}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, contents: dict[str, str], quotas: list[float]):
    assert [quota for quota, _ in cores._quotas(files(tmp_path, contents))] == quotas


def test_a_quota_that_others_use(tmp_path: Path):
    """Eight cores with nobody on them, and two cores' worth of time for this group: nothing of it was used."""
    counted = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}
    root = files(tmp_path, counted | {"sys/fs/cgroup/a/cpu.stat": "usage_usec 5000000\nuser_usec 1\n"})
    assert cores.measured(set(range(8)), 0.01, root) == {"a quota of 2 for this control group": 2.0}
    assert cores._used(root / "sys/fs/cgroup/a/cpu.stat") == 5.0


def test_what_the_user_or_slurm_says(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "affinity", lambda: set(range(1000, 1064)))  # CPUs that no line of /proc/stat is about
    monkeypatch.setattr(cores, "WINDOW_S", 0.0)
    assert cores.choose.__wrapped__() == (
        8,
        "64 cores, more than 8 help little: 8 threads; hardware.threads=64 takes all",
    )
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    assert cores.choose.__wrapped__()[0] == 6
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cores.choose.__wrapped__() == (1, "64 cores, SLURM_CPUS_PER_TASK=1: 1 thread; hardware.threads=64 takes all")
    monkeypatch.setenv("OMP_NUM_THREADS", "12,4")  # its second number is of nested parallelism
    assert cores.choose.__wrapped__()[0] == 12
    monkeypatch.setattr(cores, "affinity", lambda: {0, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores.choose.__wrapped__() == (2, "")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells what others do")
def test_a_core_that_another_process_takes():
    """Both on one CPU, so that it is busy whatever else the machine does; our own time on it doesn't count."""
    cpu = min(cores.affinity())
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            other.stdout.readline()
            (free,) = cores.measured({cpu}, cores.WINDOW_S).values()
        finally:
            other.kill()
    assert free < cores.SLACK


def test_env_workers_have_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Sixteen of them with as many threads as the user wants for the model would take all cores many times."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with EnvPool(ThreadsEnv, 1, workers=True) as envs:
        answer = envs.reset({0: 0})[0]
    assert isinstance(answer, Observation)
    assert answer.text == "1 1"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in os.environ
