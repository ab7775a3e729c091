"""What stage=ppo trains with, what its checkpoints hold of that, and how long it takes."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_agents import imports
from vlm_agents.checkpoints import Checkpoint
from vlm_agents.config import AlgoConfig, PpoConfig, RunConfig
from vlm_agents.errors import DataError
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.kl_reward import KlReward
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.novelty import Novelty
from vlm_agents.learn.shaping import CountBonus, Shaper, TurnShaper, overlong, progress, tools, unreadable
from vlm_agents.models import Agent, HFSampler
from vlm_agents.policies import TrainingSampler
from vlm_agents.progress import say
from vlm_agents.run import Run
from vlm_agents.stopwatch import Stopwatch
from vlm_agents.summary import summarise
from vlm_agents.types import Trajectory
from vlm_agents.vllm_sampler import VllmSampler
from vlm_agents.weights import RUN_MODEL, init_folder
from vlm_agents.world import ALONE, World

LEARNER = "learner.pt"


def make_learner(
    cfg: RunConfig, algo: AlgoConfig, agent: Agent, init: str | None, iterations: int, world: World = ALONE
) -> Learner:
    """The learner of `algo`; a run that goes on from another's model, `init`, takes its action predictor along."""
    shares, reply_tokens = Shares(cfg.hardware.tokens_per_microbatch, world), cfg.prompt.max_reply_tokens
    algorithm = make_algorithm(algo, reply_tokens, cfg.model.temperature_head is not None)
    shapers: dict[str, Shaper] = {}
    if algo.count_coef:
        shapers["count"] = CountBonus(algo.count_coef)
    by_turn = {
        "progress": (algo.progress_coef, progress(algo.progress_coef, algo.gamma)),
        "tool": (algo.tool_coef, tools(algo.tool_coef)),
        "tool_once": (algo.tool_once_coef, tools(algo.tool_once_coef, once=True)),
        "format": (algo.format_coef, unreadable(algo.format_coef)),
        "overlong": (algo.overlong_coef, overlong(algo.overlong_coef, reply_tokens, algo.overlong_share)),
    }
    shapers |= {name: TurnShaper(name, bonuses) for name, (coef, bonuses) in by_turn.items() if coef}
    if algo.kl_reward_coef:
        shapers["kl"] = KlReward(agent, agent.renderer, algo.kl_reward_coef, shares)
    if algo.novelty.coef:
        from vlm_agents.models.action_predictor import AdapterPredictor  # peft: seconds saved without an adapter

        model = AdapterPredictor(agent, init_folder(init) if init else None)
        shapers["novelty"] = Novelty(model, agent.renderer, algo.novelty, shares)
    engine = None
    if cfg.hardware.zero:
        from vlm_agents.learn.zero_settings import load_deepspeed  # seconds that other engines save

        load_deepspeed(cfg.hardware.device)
        from vlm_agents.learn.zero import ZeroEngine

        engine = partial(
            ZeroEngine,
            agent,
            hardware=cfg.hardware,
            weight_decay=algo.weight_decay,
            max_grad_norm=algo.max_grad_norm,
            world=world,
        )
    with imports.blamed("algo.factory", algo.factory):
        return Learner(agent, agent.renderer, algorithm, algo, iterations, shares, shapers, engine)


@contextmanager
def training_sampler(
    cfg: RunConfig, agent: Agent, learner: Learner, folder: Path, world: World = ALONE
) -> Iterator[TrainingSampler]:
    """Who samples while `learner` teaches `agent`; `folder` is for what another program has to be handed."""
    if cfg.rollout.engine == "own":
        yield HFSampler(agent)
        return
    sampler = VllmSampler(cfg.rollout, agent, folder, learner.critic is not None, world)
    try:
        yield sampler
    finally:
        sampler.close()


def best_of(run: Run, stage: PpoConfig, best: Sequence[Any] | None, step: int, success: float) -> Sequence[Any] | None:
    """The step of the checkpoint whose weights succeeded most often when they played, and how often: `best`, or those
    of `step`, which have just played, where there is one. None where `stage` doesn't keep it."""
    if not stage.keep_best or (best and success <= best[1]) or not run.has_checkpoint(step):
        return best
    return step, success


@dataclass(slots=True)
class TrainingState:
    """What a checkpoint holds of a training run beside model and learner, as JSON."""

    before: dict[str, float] = field(default_factory=dict)  # the panel's metrics before training
    last: dict[str, float] = field(default_factory=dict)  # metrics of the newest iteration
    training_seconds: float = 0.0
    env_steps: int = 0
    watch: Sequence[Any] = (0, False)
    collapse: Mapping[str, Any] = field(default_factory=dict)
    best: Sequence[Any] | None = None  # see best_of

    def over(self, iterations: int, stage: PpoConfig) -> bool:
        """Is that all, after so many iterations?"""
        return iterations >= stage.iterations or self.env_steps >= (stage.env_steps or math.inf)


def save(run: Run, agent: Agent, learner: Learner, step: int, state: TrainingState, keep: int) -> None:
    """A checkpoint after `step` iterations."""

    def write(folder: Path) -> None:
        learned = learner.state_dict()
        with learner.whole():
            if run.world.main:
                agent.save(folder / RUN_MODEL)
                torch.save(learned, folder / LEARNER)
        run.world.wait()  # an engine's own collectives have less patience
        learner.save(folder)

    run.save_checkpoint(step, write, asdict(state), keep, state.best[0] if state.best else None)


def load(checkpoint: Checkpoint, learner: Learner, iterations: int) -> TrainingState:
    """The learner's part of a checkpoint, of which the agent was loaded; the rest of its state. Says how far it is."""
    path = checkpoint.path / LEARNER
    if not path.is_file():
        raise DataError(
            f"{checkpoint.path} has no {LEARNER}: an older version wrote it. Finish the run with that version, or "
            f"choose another name= and take its weights along by stage.init={checkpoint.path}"
        )
    learner.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    learner.load(checkpoint.path)
    say(checkpoint.told("iteration", iterations))
    try:
        return TrainingState(**checkpoint.state)
    except TypeError as error:
        raise DataError(f"{checkpoint.path} is of another version of vlm_agents: finish the run with that") from error


def tell_unmoved(learner: Learner, stage: PpoConfig) -> None:
    """Say so where a run ended before its policy could learn."""
    if learner.critic and 0 < learner.iteration <= learner.critic.warmup:
        say(
            f"stage.env_steps={stage.env_steps} were played while the critic learned alone: the policy is what it was. "
            "Have more of them, or algo.value_warmup=0"
        )


class Clock:
    """Seconds and, on a GPU, peak bytes of each phase of an iteration.

    The stopwatches, cleared here, tell what a rollout's seconds went to.
    """

    def __init__(self, device: torch.device, *stopwatches: Stopwatch) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, float] = {}
        self._stopwatches = stopwatches
        for stopwatch in stopwatches:
            stopwatch.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        if self.device.type == "cuda":
            self.bytes[name] = float(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)

    def figures(self) -> dict[str, float]:
        parts = (self.seconds, *(one.seconds for one in self._stopwatches))
        times = {f"time/{name}": seconds for part in parts for name, seconds in part.items()}
        return times | {f"memory/{name}_bytes": peak for name, peak in self.bytes.items()}


def figures(
    played: Sequence[Trajectory],
    env_steps: int,
    learned: Mapping[str, float],
    clock: Clock,
    seconds: float = 0.0,
) -> dict[str, float]:
    """All that is told of an iteration: how it was played, what was learned, and how fast. `seconds` that playing took,
    if not those of the clock's phase."""
    turns = [turn for trajectory in played for turn in trajectory.turns]
    tokens, seconds = sum(len(turn.reply.token_ids) for turn in turns), seconds or clock.seconds["rollout"]
    speeds = {"speed/env_steps_per_s": len(turns) / seconds, "speed/reply_tokens_per_s": tokens / seconds}
    steps = {"rollout/env_steps": float(env_steps)}
    return {**summarise(played), **steps, **learned, **clock.figures(), **speeds}
