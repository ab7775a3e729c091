"""What packing rows and overlapping envs with the model could gain at most: `python benchmarks/waste.py`.

Of an iteration of stage=ppo in MiniGrid, with a turn a row and with whole chats: the share of padding in what the
update reads, and the share of the rollout's seconds that it waits for envs.
"""

import time

import numpy as np
import torch
from speed import CHATS, composed

from vlm_agents.config import RunConfig
from vlm_agents.learn.batches import Shares, minibatches
from vlm_agents.learn.samples import build, usable
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.seeds import Deal
from vlm_agents.stages.playing import make_policy, open_envs, play

EPISODES = 64


def main() -> None:
    torch.set_num_threads(1)
    for name, words in {"a turn a row": (), "whole chats": CHATS}.items():
        cfg = composed("stage=ppo", "env=minigrid", "name=waste", "hardware.threads=1", *words)
        print(f"{name}: {padding_and_waiting(cfg)}", flush=True)


def padding_and_waiting(cfg: RunConfig) -> str:
    assert cfg.algo is not None
    agent, size = load_agent(cfg.model, cfg.hardware), cfg.algo.group_size
    policy = make_policy(cfg, "model", HFSampler(agent))
    with open_envs(cfg.env, EPISODES, "first") as pool:
        begun = time.monotonic()
        deals = [Deal(index // size, index % size) for index in range(EPISODES)]
        episodes = list(play(cfg, pool, policy, deals, run_seed=0))
        waiting = pool.stopwatch.seconds["env"] / (time.monotonic() - begun)
    samples = build(usable(episodes), agent.renderer, thought_coef=1.0)
    plan = minibatches([len(one.row.spans) for one in samples], cfg.algo.minibatch_turns, np.random.default_rng(0))
    parts = [sorted((samples[index] for index in part), key=len, reverse=True) for part in plan]
    micro = [one for part in parts for one in Shares(cfg.hardware.tokens_per_microbatch).deal(part).own]
    read = sum(len(one) * max(map(len, one)) for one in micro)
    padding = 1 - sum(map(len, samples)) / read
    return f"{padding:.1%} of what the update reads is padding, {waiting:.1%} of the rollout waits for envs"


if __name__ == "__main__":
    main()
