"""How fast are replies sampled? `Sampler` against transformers' own `generate`, on the packaged tiny model.

Both sides answer the same MiniGrid prompts at temperature 1 and may not say the same tokens. The Sampler is timed with
all that it does: rendering, picture processing, log-probs, entropies, values. `generate`, on transformers' model as it
comes, gets its inputs as ready tensors and gives tokens alone. Reply tokens count up to and including the end of turn.
No correctness is checked here; tests/models/test_sampler.py does that.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from vlm_agents.config import HardwareConfig, MiniGridConfig, ModelConfig, PromptConfig
from vlm_agents.models import Agent, Sampler, load_agent
from vlm_agents.models.loading import TINY
from vlm_agents.policies import ExpertPolicy, NoisyPolicy
from vlm_agents.prompting import make_format
from vlm_agents.rollout import collect
from vlm_agents.stages.playing import open_envs
from vlm_agents.types import Prompt

Inputs = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast are replies sampled?")
    parser.add_argument("--rows", type=int, default=64, help="prompts in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each side, interleaved")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest reply")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    parser.add_argument("--single-rows", type=int, default=8, help="prompts answered one at a time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    agent, frozen = (load_agent(ModelConfig(name="tiny"), HardwareConfig(name="cpu"), None, f) for f in (False, True))
    prompts = minigrid_prompts(args.rows)
    few = prompts[: args.single_rows]
    stock = AutoModelForImageTextToText.from_pretrained(TINY).eval()
    batch, singles = [prepare(agent, prompts)], [prepare(agent, [prompt]) for prompt in few]
    sides: dict[str, Callable[[], int]] = {
        "Sampler": partial(sample, agent, [prompts], args.new_tokens),
        "Sampler, pictures encoded before": partial(sample, frozen, [prompts], args.new_tokens),
        "generate": partial(generate, stock, agent, batch, args.new_tokens),
        "generate, then log-probs": partial(generate, stock, agent, batch, args.new_tokens, score=True),
        "Sampler, one row at a time": partial(sample, agent, [[prompt] for prompt in few], args.new_tokens),
        "generate, one row at a time": partial(generate, stock, agent, singles, args.new_tokens),
    }
    speeds = measure(sides, args.repeats)
    print(f"{args.rows} rows ({len(few)} one at a time), {args.new_tokens} new tokens, {args.threads} threads")
    print(f"{'medians of ' + str(args.repeats):<34}{'reply tokens/s':>16}{'Sampler / this':>16}")
    for name, speed in speeds.items():
        print(f"{name:<34}{speed:>16.0f}{speeds['Sampler'] / speed:>16.1f}")


def minigrid_prompts(count: int) -> list[Prompt]:
    """Prompts out of games in which an expert plays with 30 % random moves."""
    prompt_format = make_format(PromptConfig("cot_json"))
    policy = NoisyPolicy(ExpertPolicy(prompt_format), 0.3, prompt_format)
    with open_envs(MiniGridConfig(id="MiniGrid-DoorKey-6x6-v0"), 16, advised=True) as envs:
        games = collect(envs, policy, prompt_format, range(count // 4 + 1), invalid_penalty=0.0, run_seed=0)
        prompts = [turn.prompt for game in games for turn in game.turns]
    return [prompts[index] for index in np.random.default_rng(0).permutation(len(prompts))[:count]]


def prepare(agent: Agent, prompts: Sequence[Prompt]) -> Inputs:
    """What `generate` takes: left-padded ids, and the pictures as its image processor makes them."""
    rendered = [agent.renderer.render(prompt) for prompt in prompts]
    width = max(len(row.ids) for row in rendered)
    ids = torch.full((len(rendered), width), agent.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rendered):
        ids[index, width - len(row.ids) :] = torch.from_numpy(row.ids)
        mask[index, width - len(row.ids) :] = 1
    pictures = agent.image_processor(images=[image for row in rendered for image in row.images], return_tensors="pt")
    kinds = (ids == agent.family.image_token_id).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **pictures}


def sample(agent: Agent, batches: Sequence[Sequence[Prompt]], new_tokens: int) -> int:
    """Reply tokens that the Sampler makes of the batches, one after the other."""
    count = 0
    for prompts in batches:
        replies = Sampler(agent).generate(prompts, np.random.default_rng(0).spawn(len(prompts)), new_tokens)
        count += sum(len(reply.token_ids) for reply in replies)
    return count


@torch.inference_mode()
def generate(model: Any, agent: Agent, batches: Sequence[Inputs], new_tokens: int, score: bool = False) -> int:
    """The same of transformers. `score` adds the pass that PPO would need for log-probs, over the replies alone."""
    end, count = agent.renderer.end_of_turn, 0
    for inputs in batches:
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            suppress_tokens=agent.banned.nonzero().squeeze().tolist(),
            eos_token_id=end,
            pad_token_id=agent.tokenizer.pad_token_id,
            use_cache=True,
        )
        replies = output[:, inputs["input_ids"].shape[1] :]
        ended = (replies == end).int().cumsum(1)
        inside = (ended - (replies == end).int()) == 0
        count += int(inside.sum())
        if score:
            added = torch.zeros_like(replies, dtype=torch.int32)
            whole = {
                **inputs,
                "input_ids": output,
                "attention_mask": torch.cat([inputs["attention_mask"], inside.long()], dim=1),
                "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], added], dim=1),
            }
            logits = model(**whole, logits_to_keep=replies.shape[1] + 1, use_cache=False).logits[:, :-1]
            logits.masked_fill(agent.banned, -torch.inf).log_softmax(-1).gather(-1, replies[..., None])
    return count


def measure(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median reply tokens a second of each side. They take turns, so that a busy machine slows all alike."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            count = side()
            if repeat:  # the first pass warms up
                speeds[name].append(count / (time.perf_counter() - start))
    return {name: median(values) for name, values in speeds.items()}


if __name__ == "__main__":
    main()
