"""Does what is fast learn as what is plain does? `python benchmarks/same_learning.py [--steps 3000] [--seeds 3]`.

PPO on NumberLine from the shipped weights, until as many env steps are played, each seed twice:

* ours: HFSampler's replies and log-probs, micro-batches as memory allows;
* plain: transformers' `generate` for one env after the other, log-probs by a second pass (benchmarks/serial.py), and
  micro-batches of one row.

They draw other random numbers, and so play other episodes. Told is the success of 100 held-out seeds, which both play
by HFSampler, before and after, sampled; pooled with 95 % intervals as in docs/compare.md.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from serial import SerialSampler
from speed import composed

from vlm_agents.config import RunConfig
from vlm_agents.intervals import Difference, Interval, difference, of_these_runs
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.policies import Sampler
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.learning import make_learner
from vlm_agents.stages.playing import make_policy, open_envs, play, play_panel

GAME = ("env=number_line", "env.highest=9", "env.max_steps=9")
RUN = ("stage=ppo", "name=same", "hardware.threads=1", "stage.episodes=32", "stage.num_envs=32")
ALGO = ("algo.lr=1e-4", "algo.min_lr_ratio=1", "algo.minibatch_turns=32")
ITERATIONS, PANEL = 1000, 100
PLAIN = ("hardware.tokens_per_microbatch=1",)


class PlainSampler(SerialSampler):
    """With the agent's weights of now."""

    def sync(self) -> None:
        self.model.load_state_dict(self.agent.model.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides: dict[str, tuple[tuple[str, ...], Callable[[Agent], Sampler]]] = {
        "ours": ((), HFSampler),
        "plain": (PLAIN, PlainSampler),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for seed in range(args.seeds):
        for name, (words, make) in sides.items():
            cfg = composed(*RUN, *GAME, *ALGO, f"seed={seed}", *words)
            agent = load_agent(cfg.model, cfg.hardware)
            before, steps = succeeded(cfg, agent), learn(cfg, agent, make(agent), args.steps)
            after = succeeded(cfg, agent)
            found[name].append(after)
            print(f"{name}, seed {seed}: {before.mean():.3f}, {after.mean():.3f} after {steps} steps", flush=True)
    for name, outcomes in found.items():
        print(f"{name}: {told(of_these_runs(np.stack(outcomes)))}")
    print(f"ours less plain: {told(difference(np.stack(found['plain']), np.stack(found['ours'])))}")


def told(interval: Interval | Difference) -> str:
    mean, low, high, *_ = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def learn(cfg: RunConfig, agent: Agent, sampler: Sampler, wanted: int) -> int:
    """As stage=ppo does; the env steps that were played."""
    assert cfg.algo is not None
    learner, policy, steps = make_learner(cfg, cfg.algo, agent, None, ITERATIONS), make_policy(cfg, "model", sampler), 0
    with open_envs(cfg.env, 32, "first") as pool:
        while steps < wanted:
            iteration = learner.iteration
            sampler.sync()
            deals = [Deal(training_seed(cfg.seed, iteration, start)) for start in range(32)]
            episodes = list(play(cfg, pool, policy, deals, run_seed=cfg.seed * ITERATIONS + iteration))
            learner.learn(learner.shape(episodes)[0], len(episodes), np.random.default_rng((cfg.seed, iteration)))
            steps += sum(len(one.turns) for one in episodes)
    return steps


def succeeded(cfg: RunConfig, agent: Agent) -> np.ndarray:
    """[n] of the held-out seeds."""
    sampler, found = HFSampler(agent), list[bool]()
    sampler.sync()
    with open_envs(cfg.env, 32, "never") as pool:
        policy = make_policy(cfg, "model", sampler)
        play_panel(cfg, pool, policy, PANEL, on_episode=lambda one: found.append(bool(one.success)))
    return np.array(found, dtype=float)


if __name__ == "__main__":
    main()
