"""How fast are replies sampled? `HFSampler` against transformers' own `generate`, on the packaged tiny model or the one
that settings name.

Both sides answer the same batches at temperature 1 (and may not say the same tokens): the turns of a rollout of
MiniGrid, one prompt of every env a batch. The sampler is timed as stage=ppo runs it, with all that it does: rendering,
picture processing, encoding each distinct picture once, log-probs, entropies, values. `generate`, on transformers'
model as it comes, gets its inputs as ready tensors and gives tokens alone. Reply tokens count up to and including the
end of turn. No correctness is checked here; tests/models/test_sampler.py does that.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from results import write
from speed import composed

from vlm_agents.config import RunConfig
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.policies import ExpertPolicy, NoisyPolicy
from vlm_agents.prompting import make_format
from vlm_agents.rollout import collect
from vlm_agents.seeds import Deal
from vlm_agents.stages.playing import open_envs
from vlm_agents.types import Prompt, Sampling

Inputs = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast are replies sampled?")
    parser.add_argument("words", nargs="*", metavar="SETTING=VALUE", help="of a run of stage=ppo")
    parser.add_argument("--envs", type=int, default=64, help="prompts in a batch")
    parser.add_argument("--turns", type=int, default=6, help="batches")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each side, interleaved")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest reply")
    parser.add_argument("--threads", type=int, default=2, help="torch CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    cfg = composed("stage=ppo", "env=minigrid", "name=sampler", *args.words)
    agent = load_agent(cfg.model, cfg.hardware)
    batches = rollout_prompts(cfg, args.envs, args.turns)
    alone = [[batch[0]] for batch in batches]
    stock = agent.model  # transformers' own, of which HFSampler uses the parts
    tensors, tensors_alone = ([prepare(agent, prompts) for prompts in sequence] for sequence in (batches, alone))
    sides: dict[str, Callable[[], int]] = {
        "HFSampler": partial(sample, agent, batches, args.new_tokens),
        "generate": partial(generate, stock, agent, tensors, args.new_tokens),
        "generate, then log-probs": partial(generate, stock, agent, tensors, args.new_tokens, score=True),
        "HFSampler, one env": partial(sample, agent, alone, args.new_tokens),
        "generate, one env": partial(generate, stock, agent, tensors_alone, args.new_tokens),
    }
    speeds = measure(sides, args.repeats)
    print(f"{args.turns} turns of {args.envs} envs, at most {args.new_tokens} new tokens, {args.threads} threads")
    print(f"{'medians of ' + str(args.repeats):<28}{'reply tokens/s':>16}{'HFSampler / this':>16}")
    for name, speed in speeds.items():
        print(f"{name:<28}{speed:>16.0f}{speeds['HFSampler'] / speed:>16.1f}")
    if all(getattr(args, name) == parser.get_default(name) for name in vars(args)):
        write({"rollout_vs_generate": speeds["HFSampler"] / speeds["generate"]})


def rollout_prompts(cfg: RunConfig, envs: int, turns: int) -> list[list[Prompt]]:
    """The first turns of games in which an expert plays with 30 % random moves: a batch a turn, a prompt an env."""
    policy = NoisyPolicy(ExpertPolicy(make_format(cfg.prompt)), 0.3)
    with open_envs(cfg.env, envs, "always") as pool:
        games = list(collect(pool, policy, list(map(Deal, range(envs))), run_seed=0))
    return [[game.turns[turn].prompt for game in games if turn < len(game.turns)] for turn in range(turns)]


def prepare(agent: Agent, prompts: Sequence[Prompt]) -> Inputs:
    """What `generate` takes: left-padded ids, and the pictures as its image processor makes them."""
    rendered = [agent.renderer.render(prompt) for prompt in prompts]
    width = max(len(row.ids) for row in rendered)
    ids = torch.full((len(rendered), width), agent.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rendered):
        ids[index, width - len(row.ids) :] = torch.from_numpy(row.ids)
        mask[index, width - len(row.ids) :] = 1
    pictures = agent.image_processor(
        images=[picture.image for row in rendered for picture in row.images], return_tensors="pt"
    )
    kinds = (ids == agent.family.image_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **pictures}
    return {name: tensor.to(agent.device) for name, tensor in inputs.items()}


def sample(agent: Agent, batches: Sequence[Sequence[Prompt]], new_tokens: int) -> int:
    """Reply tokens that the HFSampler makes of the batches, one after the other."""
    sampler, count = HFSampler(agent), 0
    sampler.sync()
    for prompts in batches:
        replies = sampler.generate(prompts, np.random.default_rng(0).spawn(len(prompts)), Sampling(new_tokens))
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
