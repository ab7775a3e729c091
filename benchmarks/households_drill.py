"""Many steps of ALFWorld over worker processes: `python benchmarks/households_drill.py [--steps 10000] [--workers 8]`.

Random commands. Told: steps a second, and the workers' memory after a tenth of the steps and at the end, which may be
half as much again. Of a worker that is killed on the way the episode must end as the env's error, the only one, and its
slot must play on.
"""

import argparse
import os
import random
import signal
import time
from functools import partial

from vlm_agents.config import AlfWorldConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.envs import make_env
from vlm_agents.envs.alfworld.generator import LEVELS
from vlm_agents.errors import EnvError
from vlm_agents.types import Observation

KILLED = 3  # the slot whose worker is killed half way


def resident(pool: EnvPool) -> list[float]:
    """MiB of each worker."""
    found = []
    for slot in pool._slots.values():
        with open(f"/proc/{slot._process.pid}/statm") as file:  # type: ignore[union-attr]
            found.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--level", choices=LEVELS, default="medium")
    asked = parser.parse_args()
    rng, seed, later, steps, early = random.Random(0), 0, 0, 0, [0.0]
    failed: list[int] = []
    began = time.monotonic()
    make = partial(make_env, AlfWorldConfig(level=asked.level, workers=True))
    with EnvPool(make, asked.workers, workers=True, preload=["vlm_agents.envs.alfworld.env"]) as pool:
        now: dict[int, Observation] = {}
        while steps < asked.steps:
            for slot in set(range(asked.workers)) - now.keys():
                answer = pool.reset({slot: seed})[slot]
                seed += 1
                assert isinstance(answer, Observation), answer
                now[slot] = answer
            if steps <= asked.steps // 2 < steps + asked.workers:
                os.kill(pool._slots[KILLED]._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            played = pool.step({slot: rng.choice(seen.legal_actions or ()) for slot, seen in now.items()})
            for slot, step in played.items():
                later += slot == KILLED and bool(failed)
                if isinstance(step, EnvError):
                    failed.append(slot)
                    del now[slot]
                elif step.terminated or step.truncated:
                    del now[slot]
                else:
                    now[slot] = step.observation
            steps += len(played)
            if steps - len(played) < asked.steps // 10 <= steps:
                early = resident(pool)
        seconds, late = time.monotonic() - began, resident(pool)
    print(f"{steps} steps, {seed} games in {seconds:.0f} s, {steps / seconds:.0f} steps/s over {asked.workers} workers")
    print(f"memory of a worker, at most: {max(early):.0f} MiB after a tenth, {max(late):.0f} MiB at the end")
    print(f"slots whose episode ended as the env's error: {failed}; steps of slot {KILLED} after that: {later}")
    assert failed == [KILLED]
    assert later > 0
    assert max(late) < 1.5 * max(early)


if __name__ == "__main__":
    main()
