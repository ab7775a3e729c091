"""What benchmarks/scaling_model.py takes as measured: bytes of an episode, seconds of an iteration's control, and what
a decoded token costs the host. On one core; no GPU is asked for.

The model that decodes has layers so narrow that launching its operations is all there is to do. A GPU's launches cost
more than a CPU's calls, so this is a lower bound.
"""

import pickle
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_agents.config import HardwareConfig, MiniGridConfig, ModelConfig, PromptConfig
from vlm_agents.learn import credit, signal
from vlm_agents.learn.samples import build, credited, usable
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.models.rendering import HFRenderer
from vlm_agents.pictures import Picture
from vlm_agents.policies import ModelPolicy
from vlm_agents.prompting import make_format
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal
from vlm_agents.stages.playing import open_envs
from vlm_agents.summary import summarise
from vlm_agents.types import Prompt, Sampling, Trajectory

EPISODES = 1000  # of the control
LAYERS = (4, 12)  # of the narrow models; what one layer costs is the difference
TOKENS = 32


def main() -> None:
    torch.set_num_threads(1)
    episodes, prompts = play(16)
    turns = sum(len(one.turns) for one in episodes)
    print(f"{len(pickle.dumps(episodes, 5)) / turns:.0f} bytes of a pickled turn of MiniGrid ({turns} turns)")
    print(f"{len(pickle.dumps(Picture(Image.new('RGB', (1000, 1000))), 5))} bytes of a picture of 1000 x 1000")
    many = [replace(episodes[at % len(episodes)], seed=at) for at in range(EPISODES)]
    seconds, played = control(many, agent().renderer), sum(len(one.turns) for one in many)
    print(f"{1e6 * seconds / played:.0f} us of control for a turn ({seconds:.2f} s for {EPISODES} episodes)")
    few, many_layers = (decoded(layers, prompts[:1]) for layers in LAYERS)
    ops, spent = ((b - a) / (LAYERS[1] - LAYERS[0]) for a, b in zip(few, many_layers, strict=True))
    print(f"{ops:.0f} operations and {1e6 * spent:.0f} us of the host for a layer of a decoded token")
    print(
        f"{few[0] - ops * LAYERS[0]:.0f} operations and {1e6 * (few[1] - spent * LAYERS[0]):.0f} us beside the layers"
    )


def play(episodes: int) -> tuple[list[Trajectory], list[Prompt]]:
    """Whole episodes of the packaged tiny model, and the first prompts."""
    policy = ModelPolicy(HFSampler(agent()), make_format(PromptConfig("cot_json")), Sampling(96))
    with open_envs(MiniGridConfig(), episodes, "first") as envs:
        played = list(collect(envs, policy, list(map(Deal, range(episodes))), run_seed=0))
    return played, [one.turns[0].prompt for one in played]


def agent(layers: int | None = None) -> Agent:
    """The packaged tiny model, or a narrow one."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"num_hidden_layers": layers, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    narrow = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision}
    model = ModelConfig("narrow", weights="random", architecture=narrow) if layers else ModelConfig("tiny")
    return load_agent(model, HardwareConfig("cpu", threads=1))


def control(episodes: list[Trajectory], renderer: HFRenderer) -> float:
    """Seconds of what every rank does with all episodes: credit, rows, figures."""
    start = time.perf_counter()
    kept = usable(episodes)
    earned = credit.Gae(0.99, 0.95)(kept, credit.sampled_values(kept), 0.0)
    credited(build(kept, renderer, 0.5), kept, credit.normalised(earned))
    signal.figures(kept, 0.99)
    summarise(episodes)
    return time.perf_counter() - start


class Counting(TorchDispatchMode):
    """How many operations were called."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def decoded(layers: int, prompts: list[Prompt]) -> tuple[float, float]:
    """Operations and seconds of a decoded token: of more of them, less fewer of them."""
    sampler = HFSampler(agent(layers))

    def spent(tokens: int) -> tuple[float, float]:
        rngs, sampling = np.random.default_rng(0).spawn(len(prompts)), Sampling(tokens)
        with Counting() as mode:
            sampler.generate(prompts, rngs, sampling)
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            sampler.generate(prompts, np.random.default_rng(0).spawn(len(prompts)), sampling)
            seconds.append(time.perf_counter() - start)
        return mode.count, min(seconds)

    spent(2)
    few, many = spent(4), spent(4 + TOKENS)
    return (many[0] - few[0]) / TOKENS, (many[1] - few[1]) / TOKENS


if __name__ == "__main__":
    main()
