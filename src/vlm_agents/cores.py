"""How many threads a run should have: by the cores that it may use, and by what others take of them right now.

A thread that shares its core with another process holds up all others at every barrier, so two threads on two cores of
which one is taken are several times slower than one. What others take is known on Linux alone. Knows nothing of torch.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from vlm_agents.errors import harmless

MOST = 8  # threads by themselves: a small model gains nothing by more, and a large one belongs on a GPU
WINDOW_S = 0.3  # in which others are watched; the kernel counts in hundredths of a second
LARGEST = 1024  # number of threads that is taken for one, as hardware.threads has it
SLACK = 0.3  # of a core that others may take and it still counts as free
NUMERIC = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read once, by numpy and torch as they load


@cache
def choose() -> tuple[int, str]:
    """The number of threads, and where fewer than one for each core are chosen, a line that says why.

    What OMP_NUM_THREADS says is taken: the user's word, or a launcher's, joblib's for one, that runs jobs side by side.
    Else the least of: the affinity mask, the control group's quota, what Slurm gave the task, what other processes
    leave, MOST.
    """
    cpus = affinity()
    if asked := _whole(os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()):
        return asked, ""
    room = {f"more than {MOST} help little": float(MOST)}
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):  # the second counts all tasks of a node
        if given := _whole(os.environ.get(name, "")):
            room[f"{name}={given}"] = given
            break
    room |= measured(cpus, WINDOW_S)
    why, least = min(room.items(), key=lambda pair: pair[1])
    cores = len(cpus)
    threads = max(1, min(cores, math.floor(least + SLACK)))
    if threads == cores:
        return threads, ""
    chosen = f"{cores} cores, {why.format(taken=cores - threads)}: {threads} thread{'s' if threads > 1 else ''}"
    return threads, f"{chosen}; hardware.threads={cores} takes {'both' if cores == 2 else 'all'}"


def forget_nonsense() -> None:
    """Take an OMP_NUM_THREADS that holds no numbers of threads out of the environment, and say so: libraries
    complain of it, or start thousands of them."""
    said = os.environ.get("OMP_NUM_THREADS")
    if said is not None and not all(0 < _whole(word.strip()) <= LARGEST for word in said.split(",")):
        del os.environ["OMP_NUM_THREADS"]
        if said.strip():
            print(f"OMP_NUM_THREADS={harmless(said)} is left out: it takes numbers from 1 to {LARGEST}", flush=True)


def affinity() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def measured(cpus: set[int], seconds: float, root: Path = Path("/")) -> Mapping[str, float]:
    """How many of `cpus` are free, watched for so long, and how much of a quota is: by the reason that it limits."""
    groups = {quota: usage for quota, usage in _quotas(root) if quota < len(cpus)}
    before = [_busy(cpus, root), *map(_used, groups.values())]
    started, own = time.monotonic(), time.process_time()
    time.sleep(seconds)
    own, passed = time.process_time() - own, time.monotonic() - started
    after = [_busy(cpus, root), *map(_used, groups.values())]
    others = [max(0.0, (late - early - own) / passed) for early, late in zip(before, after, strict=True)]
    free = {"{taken} busy with other processes": len(cpus) - others[0]} if others[0] else {}
    return free | {
        f"a quota of {quota:g} for this control group" + (f", {taken:.1f} of it taken" if taken > SLACK else ""): quota
        - taken
        for quota, taken in zip(groups, others[1:], strict=True)
    }


@contextmanager
def single_threaded() -> Iterator[None]:
    """Processes that are started in this block compute with one thread each."""
    before = {name: os.environ.get(name) for name in NUMERIC}
    os.environ.update(dict.fromkeys(NUMERIC, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _whole(word: str) -> int:
    """A positive whole number, else 0."""
    return int(word) if word.isascii() and word.isdigit() else 0


def _busy(cpus: set[int], root: Path) -> float:
    """Seconds that these CPUs have spent on anything since the machine started (man 5 proc_stat); 0: not told here."""
    ticks, names = 0, {f"cpu{number}" for number in cpus}
    try:
        for line in (root / "proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in names:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                ticks += user + nice + system + irq + softirq + steal
    except (OSError, ValueError):
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK")


def _quotas(root: Path) -> Iterator[tuple[float, Path]]:
    """Cores' worth of time that this process's control group, and each one around it, may use, and the file that counts
    what it has used; of version 2 or 1."""
    mounts = root / "sys/fs/cgroup"
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        mount = mounts if not controllers else mounts / "cpu" if "cpu" in controllers.split(",") else None
        if mount is None:
            continue
        inside = Path(path.lstrip("/"))
        for group in dict.fromkeys([mount / inside, *(mount / parent for parent in inside.parents), mount]):
            try:
                if controllers:
                    limit, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    limit, period = (group / "cpu.max").read_text().split()
                if limit.strip() != "max" and int(limit) > 0:
                    yield int(limit) / int(period), group / ("cpuacct.usage" if controllers else "cpu.stat")
            except (OSError, ValueError):
                continue


def _used(counter: Path) -> float:
    """Seconds of CPU time that a control group has used; 0: not told here."""
    try:
        words = counter.read_text().split()
        return int(words[0]) / 1e9 if counter.name == "cpuacct.usage" else int(words[1]) / 1e6  # usage_usec is first
    except (OSError, ValueError, IndexError):
        return 0.0
