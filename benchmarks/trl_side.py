"""TRL's GRPOTrainer with its environment interface, on our env, prompts and weights; benchmarks/speed.py runs it.

In an environment of its own that has trl, and this package without its requirements. The chat is the same as ours under
prompt.history=full, token for token, and every reply is the call of a tool: both sides play every episode to its last
turn. What TRL keeps and computes anew is its own affair. A line of JSON for each training step: env steps, seconds of
playing, and of all.
"""

import argparse
import json
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports] (in an environment of its own)

from vlm_agents.config import MiniGridConfig, PromptConfig
from vlm_agents.envs.minigrid import MiniGrid
from vlm_agents.prompting import make_format
from vlm_agents.types import Observation

# our template, with a tool's answer as the user's turn; the names that TRL wants to see are never part of a row
TEMPLATE = """{% for message in messages %}<|im_start|>{{ 'user' if message['role'] == 'tool' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = {  # the whole reply, whatever it says
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "close_pattern": r"<\|im_end\|>\s*",
            "content": "text",
            "transform": [{"type": "function", "function": {"name": "act", "arguments": {"reply": "{content}"}}}],
        },
    },
}


FORMAT = make_format(PromptConfig("cot_json", history="full"))


class Game:
    """What TRL plays: `act` is the tool."""

    played = 0  # by all of them

    def __init__(self) -> None:
        self._game = MiniGrid(MiniGridConfig())
        self._reward, self._over = 0.0, False

    def reset(self, seed: int, **columns: Any) -> list[dict[str, Any]]:
        self._reward, self._over = 0.0, False
        return _parts(self._game.reset(seed))

    def act(self, reply: str) -> list[dict[str, Any]]:
        """
        Acts in the world.

        Args:
            reply: what to do.
        """
        Game.played += 1  # after the end too: TRL goes on asking
        if self._over:
            return [{"type": "text", "text": "over"}]
        step = self._game.step(FORMAT.parse(reply, tuple(self._game.actions)).action)
        self._reward += step.reward
        self._over = step.terminated or step.truncated
        return _parts(step.observation)

    def get_reward(self) -> float:
        return self._reward


def _parts(seen: Observation) -> list[dict[str, Any]]:
    return [{"type": "image", "image": seen.images[0].image}, {"type": "text", "text": seen.text}]


class Lines(TrainerCallback):
    """Tells of each step."""

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes
        self.playing, self.start, self.played = 0.0, 0.0, 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.playing, self.start, self.played = 0.0, time.perf_counter(), Game.played

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.start
        steps = Game.played - self.played + self.episodes  # the last replies too
        print(json.dumps({"steps": steps, "rollout": self.playing, "iteration": seconds}), flush=True)


class Processor(Qwen2_5_VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None


def processor(folder: str) -> ProcessorMixin:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, CALL
    return Processor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, None, TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the weights")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--reply-tokens", type=int, default=96)
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="outputs/trl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    shown = processor(args.model)
    game = MiniGrid(MiniGridConfig())
    first, *_ = FORMAT.prompt(game.instructions, (), game.reset(0))
    prompt = [{"role": "system", "content": first.parts[0]}, {"role": "user", "content": ""}]
    starts = args.iterations * args.episodes // args.group
    banned = [index for index, text in enumerate(shown.tokenizer.convert_ids_to_tokens(range(8))) if index != 2]
    settings = GRPOConfig(
        output_dir=args.output,
        max_steps=args.iterations,
        per_device_train_batch_size=args.microbatch,
        gradient_accumulation_steps=args.episodes // args.microbatch,
        num_generations=args.group,
        max_completion_length=args.turns * 200,
        max_tool_calling_iterations=args.turns - 1,  # a reply before each, and the last, which no tool gets
        generation_kwargs={"max_new_tokens": args.reply_tokens, "suppress_tokens": banned},
        beta=0.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lines = Lines(args.episodes)
    data = Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in range(starts)])
    trainer = GRPOTrainer(
        model,
        args=settings,
        train_dataset=data,
        processing_class=shown,
        environment_factory=Game,
        callbacks=[lines],
    )
    generate = trainer._generate

    def timed(prompts: list[Any]) -> Any:
        start = time.perf_counter()
        try:
            return generate(prompts)
        finally:
            lines.playing += time.perf_counter() - start

    trainer._generate = timed
    trainer.train()


if __name__ == "__main__":
    main()
