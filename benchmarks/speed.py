"""Rollout, update and whole iteration against others' ways, as ratios: `make bench`.

All play MiniGrid with the packaged tiny model, the same starts for all, on the same threads, and take turns in one run,
so that a busy machine slows all alike. Written to benchmarks/results.json; docs/results/speed.md says what is compared.
Settings, such as `model=qwen2_5_vl_3b model.weights=random hardware=gpu`, change the model and machine of ours and of
serial; then nothing is written.

* serial: benchmarks/serial.py, against stage=ppo as it is by default.
* trl: benchmarks/trl_side.py, against algo=grpo with the same chats, where `--trl` names a Python that has trl.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from hydra import initialize_config_dir
from results import write
from serial import SerialSampler, learn

from vlm_agents.chain import checked
from vlm_agents.config import PpoConfig, RunConfig, conf_dir, register
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.models.loading import TINY
from vlm_agents.policies import Sampler
from vlm_agents.seeds import Deal
from vlm_agents.stages.learning import make_learner
from vlm_agents.stages.playing import make_policy, open_envs, play
from vlm_agents.types import Trajectory

Clock = Callable[[], float]  # seconds
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
TURNS, EPISODES, GROUP = 12, 64, 8  # of TRL's side and of ours beside it
CHATS = ("algo=grpo", "prompt.history=full", f"env.max_steps={TURNS}", f"algo.group_size={GROUP}")
ONE_STEP = (f"stage.episodes={EPISODES}", f"algo.minibatch_turns={TURNS * EPISODES}")  # of the optimizer, as TRL has it


class Measured(NamedTuple):
    """Env steps that were played and learned from, and seconds of each."""

    steps: int
    rollout: float
    update: float

    @property
    def speeds(self) -> dict[str, float]:
        """Steps a second."""
        seconds = {"rollout": self.rollout, "update": self.update, "iteration": self.rollout + self.update}
        return {part: self.steps / its for part, its in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="SETTING=VALUE", help="of a run of stage=ppo")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each side, interleaved")
    parser.add_argument("--serial-episodes", type=int, default=4, help="that the serial side plays; ours plays 64")
    parser.add_argument("--trl", help="a Python that has trl and, without its requirements, this package")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = ("stage=ppo", "env=minigrid", "name=speed", f"hardware.threads={args.threads}", *args.words)
    # no warm-up, in which the critic learns alone and the policy makes no step
    default, chats = composed(*shared, "algo.value_warmup=0"), composed(*shared, *CHATS, *ONE_STEP)
    pairs = {"serial": (partial(ours, default), partial(serial, default, args.serial_episodes))}
    if args.trl:
        pairs["trl"] = (partial(ours, chats), partial(trl, args.trl, chats, args.threads))
    ratios: dict[str, list[float]] = {}
    for repeat in range(args.repeats + 1):
        for name, (fast, slow) in pairs.items():
            found, other = fast().speeds, slow().speeds
            for part, speed in found.items() if repeat else ():  # the first pass warms up
                print(f"{part}_vs_{name}: {speed:.1f} and {other[part]:.2f} steps/s", flush=True)
                ratios.setdefault(f"{part}_vs_{name}", []).append(speed / other[part])
    found = {name: median(each) for name, each in ratios.items()}
    print(json.dumps(found, indent=2))
    if not args.words:
        write(found)


def composed(*words: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return checked(words)


def ours(cfg: RunConfig, clock: Clock = time.perf_counter) -> Measured:
    """The rollout and the update of an iteration of stage=ppo."""
    assert isinstance(cfg.stage, PpoConfig)
    assert cfg.algo is not None
    agent = load_agent(cfg.model, cfg.hardware)
    learner = make_learner(cfg, cfg.algo, agent, None, cfg.stage.iterations)
    episodes, seconds = played(cfg, HFSampler(agent), cfg.stage.num_envs, cfg.stage.episodes, clock)
    shaped, _ = learner.shape(episodes)
    told = dict[str, float]()
    update = timed(lambda: told.update(learner.learn(shaped, len(shaped), np.random.default_rng(0))), clock)
    assert told["ppo/updates"] > 0
    return Measured(sum(len(one.turns) for one in episodes), seconds, update)


def serial(cfg: RunConfig, count: int) -> Measured:
    assert cfg.algo is not None
    sampler = SerialSampler(load_agent(cfg.model, cfg.hardware))
    episodes, seconds = played(cfg, sampler, 1, count)
    longest, turns, lr = cfg.prompt.max_reply_tokens, cfg.algo.minibatch_turns, cfg.algo.lr
    update = timed(lambda: learn(sampler, episodes, longest, turns, lr))
    return Measured(sum(len(one.turns) for one in episodes), seconds, update)


def trl(python: str, cfg: RunConfig, threads: int) -> Measured:
    """The second of two training steps."""
    sizes = {
        "episodes": EPISODES,
        "group": GROUP,
        "turns": TURNS,
        "reply-tokens": cfg.prompt.max_reply_tokens,
        "threads": threads,
    }
    words = [f"--{name}={size}" for name, size in sizes.items()]
    with TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).with_name("trl_side.py")), str(TINY), *words, f"--output={folder}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | QUIET)
    *_, last = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"steps"'))
    return Measured(last["steps"], last["rollout"], last["iteration"] - last["rollout"])


def played(
    cfg: RunConfig, sampler: Sampler, envs: int, episodes: int, clock: Clock = time.perf_counter
) -> tuple[list[Trajectory], float]:
    """Groups of plays, as stage=ppo has them, and the seconds that they took."""
    assert cfg.algo is not None
    policy, size = make_policy(cfg, "model", sampler), cfg.algo.group_size
    deals = [Deal(index // size, index % size) for index in range(episodes)]
    found: list[Trajectory] = []
    with open_envs(cfg.env, envs, "first") as pool:
        seconds = timed(lambda: found.extend(play(cfg, pool, policy, deals, run_seed=0)), clock)
    return found, seconds


def timed(act: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    start = clock()
    act()
    return clock() - start


if __name__ == "__main__":
    main()
