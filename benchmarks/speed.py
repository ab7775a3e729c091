"""Rollout, update and whole iteration against others' ways, as ratios: `python benchmarks/speed.py`, or `make bench`.

All play MiniGrid with the packaged tiny model, the same starts for all, on the same threads, and take turns in one run,
so that a busy machine slows all alike. Written to benchmarks/results.json; docs/results/speed.md says what is compared.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from hydra import initialize_config_dir
from serial import SerialSampler, update

from vlm_agents.chain import checked
from vlm_agents.config import PpoConfig, RunConfig, conf_dir, register
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.policies import Sampler
from vlm_agents.seeds import Deal
from vlm_agents.stages.learning import make_learner
from vlm_agents.stages.playing import make_policy, open_envs, play
from vlm_agents.types import Trajectory

RESULTS = Path(__file__).parent / "results.json"
GOALS = {"rollout_vs_serial": 30.0, "iteration_vs_serial": 25.0}


class Measured(NamedTuple):
    """Env steps that were played or learned from, and seconds."""

    steps: int
    seconds: float

    @property
    def speed(self) -> float:
        return self.steps / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each side, interleaved")
    parser.add_argument("--serial-episodes", type=int, default=4, help="that the slow side plays; ours plays a rollout")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = checked(["stage=ppo", "env=minigrid", "name=speed", f"hardware.threads={args.threads}"])
    found: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        ours, serial = iteration(cfg), serial_iteration(cfg, args.serial_episodes)
        if repeat:  # the first pass warms up
            for part, (fast, slow) in {"rollout": (ours[0], serial[0]), "update": (ours[1], serial[1])}.items():
                found.setdefault(part, []).append(fast.speed / slow.speed)
                print(f"{part}: {fast.speed:.1f} and {slow.speed:.2f} steps/s", flush=True)
            whole = [sum(1 / part.speed for part in side) for side in (ours, serial)]
            found.setdefault("iteration", []).append(whole[1] / whole[0])
    write({f"{part}_vs_serial": median(ratios) for part, ratios in found.items()})


def iteration(cfg: RunConfig) -> tuple[Measured, Measured]:
    """Rollout and update of an iteration of stage=ppo."""
    assert isinstance(cfg.stage, PpoConfig)
    assert cfg.algo is not None
    agent = load_agent(cfg.model, cfg.hardware)
    learner = make_learner(cfg, cfg.algo, agent, None, cfg.stage.iterations)
    episodes, rollout = played(cfg, HFSampler(agent), cfg.stage.num_envs, cfg.stage.episodes)
    shaped, _ = learner.shape(episodes)
    return rollout, timed(rollout.steps, lambda: learner.learn(shaped, len(shaped), np.random.default_rng(0)))


def serial_iteration(cfg: RunConfig, episodes: int) -> tuple[Measured, Measured]:
    assert cfg.algo is not None
    sampler = SerialSampler(load_agent(cfg.model, cfg.hardware))
    found, rollout = played(cfg, sampler, 1, episodes)
    longest, turns, lr = cfg.prompt.max_reply_tokens, cfg.algo.minibatch_turns, cfg.algo.lr
    return rollout, timed(rollout.steps, lambda: update(sampler, found, longest, turns, lr))


def played(cfg: RunConfig, sampler: Sampler, envs: int, episodes: int) -> tuple[list[Trajectory], Measured]:
    policy = make_policy(cfg, "model", sampler)
    with open_envs(cfg.env, envs, "first") as pool:
        start = time.perf_counter()
        found = list(play(cfg, pool, policy, list(map(Deal, range(episodes))), run_seed=0))
        seconds = time.perf_counter() - start
    return found, Measured(sum(len(one.turns) for one in found), seconds)


def timed(steps: int, act: Callable[[], object]) -> Measured:
    start = time.perf_counter()
    act()
    return Measured(steps, time.perf_counter() - start)


def write(values: dict[str, float]) -> None:
    """Into RESULTS, beside what other benchmarks wrote."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, value in values.items():
        found[name] = {"value": round(value, 2), "goal": GOALS.get(name), "unit": "times"}
    RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
