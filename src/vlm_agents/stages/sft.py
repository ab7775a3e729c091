"""Supervised fine-tuning on chats: transformers' Trainer around the agent, renderer and log-probs that PPO uses too."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vlm_agents.checkpoints import Checkpoint
from vlm_agents.config import HardwareConfig, RunConfig, SftConfig
from vlm_agents.errors import DataError, TrainingError
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.engine import AdamW, sum_gradients
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.processes import environment
from vlm_agents.progress import say, track, under_way
from vlm_agents.report import Example
from vlm_agents.run import Run, seed_everything
from vlm_agents.stages.cards import origin_of, save_model
from vlm_agents.stages.playing import refuse_too_long
from vlm_agents.stages.reporting import report
from vlm_agents.stages.sft_data import Chats, check
from vlm_agents.types import Sampling
from vlm_agents.weights import RUN_MODEL

LINES = 10  # with the loss, on the screen
EXAMPLES = 6  # rows in report.html
GROUPED = 8  # batches that are drawn together, then sorted by length
NAMES = {"grad_norm": "grad_norm", "learning_rate": "lr"}  # the Trainer's, ours
# By what accelerate, which the Trainer asks, counts ranks.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")


def main(cfg: RunConfig, stage: SftConfig, run: Run) -> dict[str, float]:
    checkpoint = run.restore()
    seed_everything(cfg.seed)
    init = str(checkpoint.path) if checkpoint else stage.init
    agent = load_agent(cfg.model, cfg.hardware, init)
    if agent.temperature_head is not None:
        agent.temperature_head.requires_grad_(False)  # learned from rewards alone
    run.env, form = origin_of(Path(stage.data))
    budget = cfg.prompt.max_prompt_tokens
    refuse_too_long(agent.renderer.context, "prompt.max_prompt_tokens", budget, cfg.prompt.max_reply_tokens)
    paths = [Path(stage.data) / f"{split}.parquet" for split in ("train", "validation")]
    # preprocess writes no file of no rows
    splits = [
        Chats(path, agent.renderer, budget, cfg.prompt.whole) for path in paths if path == paths[0] or path.exists()
    ]
    with under_way("sft: looking at every row"):
        skipped = check(splits, stage.skip_bad)
    train, *held_out = splits
    if not len(train):
        raise DataError(f"{train.path} has no row to train on: run stage=preprocess again, with other data")
    shares = Shares(cfg.hardware.tokens_per_microbatch, run.world)
    # The Trainer shall know of one process: it would give each rank other batches, and miscount ranks on a CPU.
    with environment(dict.fromkeys(RANKS)):
        trainer = SftTrainer(run, agent, cfg.hardware, stage, train, cfg.seed, shares)
        run.begin()
        trainer.learn(checkpoint)
    metrics = {"sft/loss": trainer.progress["loss"], "sft/rows": float(len(train))}
    if stage.skip_bad:
        metrics["sft/skipped_rows"] = float(skipped)
    for validation in filter(len, held_out):
        metrics |= validate(agent.eval(), validation, stage.batch_size, shares)
        metrics["sft/val_rows"] = float(len(validation))
    run.log(trainer.progress["step"], metrics)
    save_model(run, agent.save, metrics, train.example(), form)
    examples = answered(agent.eval(), next(filter(len, held_out), train))
    return run.finish(metrics, {"model": run.path(RUN_MODEL), "report": report(run, metrics, examples=examples)})


class GroupedSampler(Sampler[int]):
    """Shuffled indices in which rows that share a batch have like numbers of pictures and like lengths, so that
    little is padded. Its order depends on (seed, epoch) alone, which is what resuming needs."""

    def __init__(self, lengths: Sequence[tuple[int, int]], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths)).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), self.batch_size * GROUPED):
            group = sorted(order[start : start + self.batch_size * GROUPED], key=lambda index: self.lengths[index])
            batches += [group[at : at + self.batch_size] for at in range(0, len(group), self.batch_size)]
        *full, last = batches
        for batch in [*(full[index] for index in rng.permutation(len(full))), last]:
            yield from batch


class SftTrainer(Trainer):
    """The Trainer with our rows, loss and checkpoints: a batch is a list of rows, cut into micro-batches by tokens.

    All ranks go through the same batches; each passes its share of a batch through the model."""

    def __init__(
        self,
        run: Run,
        agent: Agent,
        hardware: HardwareConfig,
        stage: SftConfig,
        train: Chats,
        seed: int,
        shares: Shares,
    ) -> None:
        self.run, self.agent, self.shares, self.stage = run, agent, shares, stage
        # what a checkpoint keeps: the steps done, the mean loss on the last line of the curves, each step's since then
        self.progress: dict[str, Any] = {"step": 0, "done": False, "loss": float("nan"), "since": []}
        self.order = GroupedSampler(train.lengths(), stage.batch_size, seed)
        self.steps = steps = math.ceil(math.ceil(len(train) / stage.batch_size) * stage.epochs)
        arguments = TrainingArguments(
            output_dir=str(run.dir),
            num_train_epochs=stage.epochs,
            per_device_train_batch_size=stage.batch_size,
            warmup_steps=min(stage.warmup_steps, steps // 2),
            lr_scheduler_type="cosine",
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            save_steps=stage.checkpoint_every,
            logging_steps=10,
            seed=seed,
            use_cpu=hardware.device == "cpu",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
        )
        arguments._n_gpu = 1  # else the Trainer would multiply the batch by the GPUs that it sees
        super().__init__(
            model=agent,
            args=arguments,
            train_dataset=train,
            data_collator=lambda rows: {"rows": rows},
            callbacks=[Curves(run, self)],
            optimizer_cls_and_kwargs=(AdamW, {"lr": stage.lr, "fused": True}),
        )
        self.remove_callback(PrinterCallback)

    def learn(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from this checkpoint where there is one."""
        if checkpoint:
            self.progress |= checkpoint.state
            say(checkpoint.told("step", self.steps))
        if self.progress["done"]:  # where epochs is no whole number, the Trainer would take one more step
            return
        with under_way("sft step", self.steps, self.progress["step"]) as self.work:
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        return self.order

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Mean negative log-prob over all reply tokens of the batch, whatever the ranks and micro-batches are."""
        model.train()
        world, rows = self.shares.world, inputs["rows"]
        if not world.main:  # dropout of its own; that of the first rank goes on as a checkpoint has it
            torch.manual_seed(self.run.seed_for("dropout", world.rank, self.state.global_step))
        count = sum(sum(row.reply_lengths) for row in rows)
        total = torch.zeros((), device=self.agent.device)
        for part in self.shares.deal(rows).own:
            loss = -self.agent.score(part).logprobs.sum() / count
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"sft loss is {loss.item()} on rows {', '.join(row.ident for row in part[:3])} ...: lower stage.lr"
                )
            self.accelerator.backward(loss)
            total += loss.detach()
        world.add([total])
        sum_gradients([parameter for parameter in self.agent.parameters() if parameter.requires_grad], world)
        self.progress["since"].append(float(total))
        return total

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Through the run, which makes it atomic and keeps the curves in step with it."""
        step, keep = self.state.global_step, self.stage.keep_checkpoints
        self.run.save_checkpoint(step, self._write_checkpoint, self.progress, keep)

    def _write_checkpoint(self, folder: Path) -> None:
        if not self.run.world.main:  # what it has is what the first rank writes
            return
        self.agent.save(folder / RUN_MODEL)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to do: the agent was loaded from the checkpoint."""


class Curves(TrainerCallback):
    """The Trainer's log lines, into the run and to whoever watches. The mean loss is our own: the Trainer's begins anew
    at a resume."""

    def __init__(self, run: Run, trainer: SftTrainer) -> None:
        self.run, self.trainer = run, trainer
        self.part, self.printed = max(1, trainer.steps // LINES), 0
        self.stopping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step == state.max_steps
        control.should_log |= done  # the last steps too, be they fewer
        self.stopping = self.run.asked_to_stop() and not done
        control.should_save |= self.stopping
        self.trainer.progress |= {"step": state.global_step, "done": done}
        self.trainer.work.reach(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            self.run.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            loss = float(np.mean(self.trainer.progress["since"]))
            self.trainer.progress |= {"loss": loss, "since": []}
            state.log_history[-1]["loss"] = loss
            rest = {f"sft/{ours}": float(logs[name]) for name, ours in NAMES.items() if name in logs}
            self.run.log(state.global_step, {"sft/loss": loss, **rest})
            self.trainer.work.reach(state.global_step, f"loss {loss:.4f}")
            if state.global_step // self.part > self.printed // self.part or state.global_step == state.max_steps:
                say(str(self.trainer.work))
                self.printed = state.global_step


@torch.no_grad()
def validate(agent: Agent, chats: Chats, batch_size: int, shares: Shares) -> dict[str, float]:
    """Mean negative log-prob of a held-out reply token, and the mean probability of a whole held-out reply.

    TrainingError where one isn't finite.
    """
    tokens: list[Tensor] = []
    replies: list[Tensor] = []
    for start in track(range(0, len(chats), batch_size), "sft validation", -(-len(chats) // batch_size), "batches"):
        rows = [chats[index] for index in range(start, min(start + batch_size, len(chats)))]
        for part in shares.deal(rows).own:
            logprobs = agent.score(part).logprobs
            tokens.append(logprobs)
            sums = [reply.sum() for reply in logprobs.split([length for row in part for length in row.reply_lengths])]
            idents = [row.ident for row in part for _ in row.spans]
            for ident, total in zip(idents, sums, strict=True):
                if not torch.isfinite(total):
                    raise TrainingError(f"sft/val_loss is {-total.item()} on row {ident}: lower stage.lr")
            replies += sums
    found = shares.world.gather((tokens, replies))
    tokens, replies = (list(chain.from_iterable(theirs)) for theirs in zip(*found, strict=True))
    return {
        "sft/val_loss": -float(torch.cat(tokens).mean()),
        "sft/val_reply_probability": float(torch.stack(replies).exp().mean()),
    }


def answered(agent: Agent, chats: Chats) -> list[Example]:
    """Some rows with what the model says to them: its likeliest tokens, no more of them than the answer has."""
    examples = []
    sampler = HFSampler(agent)
    for index in np.unique(np.linspace(0, len(chats) - 1, EXAMPLES, dtype=int)).tolist():
        prompt, answer, tokens = chats.question(index)
        (reply,) = sampler.generate([prompt], [np.random.default_rng(0)], Sampling(len(tokens), greedy=True))
        cut = "" if reply.finish == "stop" else " (cut here, being longer than the answer)"
        examples.append(Example(prompt, answer, reply.text + cut))
    return examples
