"""How near the device's limits do decode and update come? `python benchmarks/roofline.py [SETTING=VALUE ...]`.

Plays and learns an iteration of stage=ppo, as many episodes as envs (64 of MiniGrid with the packaged tiny model unless
the settings say otherwise), once to warm up and once to be timed.

* decode: a pass can't be faster than the memory gives the language part's weights, once, and its rows' keys and values.
* update: nor can it be faster than the products of matrices that it makes, which torch's counter counts in a further
  update.

What the device can do is measured here too: copying a large tensor, and multiplying matrices of the weights' type.
"""

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from speed import composed, played, timed
from torch.utils.flop_counter import FlopCounterMode

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.sampler import Prefilled, Replies
from vlm_agents.stages.learning import make_learner
from vlm_agents.types import Trajectory

START = ("stage=ppo", "env=minigrid", "name=roofline", "algo.value_warmup=0")
COPIED, SIDE = 2**28, {"cpu": 1024, "cuda": 8192}  # bytes; of the matrices


def attention(query: Sequence[int], key: Sequence[int], *_: object, out_shape: object, **__: object) -> int:
    """Operations of two products for each of [N H Q D] queries with [N h K D] keys."""
    return 4 * math.prod(query) * key[2]


# what torch's counter doesn't know; backward makes five products where forward makes two, from the gradient first
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *its, **named: (
        5 * attention(*its, **named) // 2
    ),
}


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=ON_CPU)


class CountingSampler(HFSampler):
    """Counts the bytes that its decoding has to read, and its passes."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        text, head = agent.family.text, agent.family.lm_head
        looked_up = {id(parameter) for parameter in agent.family.embed_tokens.parameters()}
        read = [one for one in text.parameters() if id(one) not in looked_up] + list(head.parameters())
        self.weights = sum(map(size, read))
        self.bytes, self.passes = 0, 0

    def _read(self, batch: Prefilled, replies: Replies, rows: np.ndarray, drafts: np.ndarray) -> torch.Tensor:
        hidden = super()._read(batch, replies, rows, drafts)
        cached = [state[..., : layer.length, :] for layer in batch.layers for state in (layer.keys, layer.values)]
        self.bytes += self.weights + sum(map(size, cached))
        self.passes += 1
        return hidden


def main() -> None:
    for name, share in shares(composed(*START, *sys.argv[1:])).items():
        print(f"{name}: {share:.1%}")


def shares(cfg: RunConfig) -> dict[str, float]:
    """Of what the device could do, by name; says what they are made of."""
    assert isinstance(cfg.stage, PpoConfig)
    assert cfg.algo is not None
    envs, count, agent = cfg.stage.num_envs, cfg.stage.episodes, load_agent(cfg.model, cfg.hardware)
    learner = make_learner(cfg, cfg.algo, agent, None, cfg.stage.iterations)
    settle = torch.cuda.synchronize if agent.device.type == "cuda" else lambda: None
    bandwidth = best(copying(agent.device), settle)
    peak = best(multiplying(agent.device, agent.family.embed_tokens.weight.dtype), settle)

    def rollout() -> tuple[CountingSampler, list[Trajectory]]:
        sampler = CountingSampler(agent)
        with sampler.synced():
            return sampler, played(cfg, sampler, envs, count)[0]

    def update(episodes: Sequence[Trajectory]) -> None:
        learner.learn(learner.shape(episodes)[0], len(episodes), np.random.default_rng(0))
        settle()

    update(rollout()[1])  # warms up
    sampler, episodes = rollout()
    decoding, updating = sampler.stopwatch.seconds["decode"], timed(lambda: update(episodes))
    with counting() as counter:
        update(episodes)
    read, flops = sampler.bytes / decoding, counter.get_total_flops() / updating
    print(
        f"decode: {sampler.passes} passes, {decoding:.2f} s, {read / 1e9:.2f} of {bandwidth / 1e9:.2f} GB/s\n"
        f"update: {updating:.2f} s, {flops / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s"
    )
    return {"decode, of the memory's bandwidth": read / bandwidth, "update, of the peak": flops / peak}


def size(tensor: torch.Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()


def copying(device: torch.device) -> tuple[Callable[[], object], float]:
    """An act, and the bytes that it reads and writes."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPIED


def multiplying(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """An act, and its floating-point operations."""
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: left @ right, 2 * side**3


def best(act: tuple[Callable[[], object], float], settle: Callable[[], None], tries: int = 20) -> float:
    """The most that was done in a second."""
    do, amount = act

    def once() -> None:
        do()
        settle()

    once()
    return amount / min(timed(once) for _ in range(tries))


if __name__ == "__main__":
    main()
