"""Reinforcement learning: collect whole episodes, turn them into rows, update; evaluate before and after.

Between iterations a run is weights, optimizer and counters, nothing else: every random draw is seeded by
(run seed, iteration). That is what makes resuming exact.
"""

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.episodes import EpisodeWriter, read_episodes
from vlm_agents.learn import signal
from vlm_agents.learn.batch import rows as build_rows
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.novelty import TemporalPredictor
from vlm_agents.learn.update import update
from vlm_agents.metrics import headline
from vlm_agents.models import Agent, load_agent
from vlm_agents.progress import say, track
from vlm_agents.rollout import collect
from vlm_agents.run import Run, seed_everything
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.cards import save_model
from vlm_agents.stages.playing import (
    SHARES,
    format_of,
    has_expert,
    model_policy,
    open_envs,
    play_baselines,
    play_model,
)
from vlm_agents.stages.reporting import Album, remember, remembered, report, shown, tell
from vlm_agents.stages.watch import Watch, conclude
from vlm_agents.summary import summarise
from vlm_agents.types import Trajectory
from vlm_agents.weights import RUN_MODEL, init_folder

RECORDED = 4  # episodes of each iteration kept in episodes.jsonl
OPTIMIZER = "optimizer.pt"
PREDICTOR = "temporal_predictor.pt"


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    stage, algo = cfg.stage, cfg.algo
    assert isinstance(stage, PpoConfig)
    assert algo is not None
    run.append_only("episodes.jsonl")
    checkpoint = run.restore()
    seed_everything(cfg.seed)
    init = str(checkpoint.path) if checkpoint else stage.init
    agent = load_agent(cfg.model, cfg.hardware, init, freeze_vision=stage.freeze_vision)
    engine = TorchEngine(agent.parameters_by_role(), algo, stage.iterations)
    predictor = temporal_predictor(cfg, agent, init)
    learners = {name: part for name, part in ((OPTIMIZER, engine), (PREDICTOR, predictor)) if part}
    writer = EpisodeWriter(run.dir)
    state: dict[str, Any] = {"before": {}, "last": {}, "training_seconds": 0.0}
    if checkpoint:
        for name, learner in learners.items():
            learner.load_state_dict(torch.load(checkpoint.path / name, weights_only=True))
        state |= checkpoint.state
        say(checkpoint.told("iteration", stage.iterations))

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            agent.save(folder / RUN_MODEL)
            for name, learner in learners.items():
                torch.save(learner.state_dict(), folder / name)

        writer.sync()
        run.save_checkpoint(step, write, state, stage.keep_checkpoints)

    watch = Watch(cfg, stage.iterations)
    run.begin()
    with open_envs(cfg.env, stage.num_envs, has_expert(cfg.env)) as envs:
        if stage.eval_episodes and not checkpoint:
            state["before"] = evaluate(cfg, run, envs, agent, 0, album := Album())
            remember(run, album)
            save(0)
        for iteration in range(checkpoint.step if checkpoint else 0, stage.iterations):
            state["last"], trajectories = iterate(cfg, run, envs, agent, engine, predictor, iteration)
            state["training_seconds"] += state["last"]["time/rollout"] + state["last"]["time/update"]
            tell(run, iteration, stage.iterations, state["last"], trajectories[0])
            watch.look(iteration, state["last"], trajectories)
            writer.append(*trajectories[:RECORDED])
            done = iteration + 1
            if stage.eval_episodes and stage.eval_every and done % stage.eval_every == 0 and done < stage.iterations:
                evaluate(cfg, run, envs, agent, done, Album(first=0))
            if done % stage.checkpoint_every == 0 or done == stage.iterations:
                save(done)
        after = evaluate(cfg, run, envs, agent, stage.iterations, album := Album())
    first = next(read_episodes(run.dir, skip_damaged=True), None)
    prompt = first.turns[0].prompt if first and first.turns else None
    save_model(run, agent.save, {**after, **before_of(state)}, prompt, cfg.prompt.format)
    return finish(run, state, after, album)


def before_of(state: dict[str, Any]) -> dict[str, float]:
    """The held-out panel before training."""
    return {f"{name}_before": value for name, value in state["before"].items()}


def finish(run: Run, state: dict[str, Any], after: dict[str, float], album: Album) -> dict[str, float]:
    """Report and summary: the last iteration's metrics, and the held-out panel after and before."""
    before = before_of(state)
    metrics = {**state["last"], **after, **before, "time/training": state["training_seconds"]}
    conclude(state["last"])
    recorded = deque(read_episodes(run.dir, skip_damaged=True), RECORDED)
    episodes = [*shown(album.episodes, "after training"), *remembered(run)] or shown(recorded)
    artifacts = {"model": run.path(RUN_MODEL), "report": report(run, metrics, episodes)}
    kept = {name: value for name, value in metrics.items() if name not in before or name.startswith(SHARES)}
    return run.finish(kept, artifacts | {"episodes": run.path("episodes.jsonl")})


def temporal_predictor(cfg: RunConfig, agent: Agent, init: str | None) -> TemporalPredictor | None:
    """The maker of `algo.novelty`'s bonus; a run that goes on from another's model takes its predictor along."""
    if cfg.algo is None or not cfg.algo.novelty.coef:
        return None
    from vlm_agents.models.foreteller import AdapterForeteller  # peft: seconds that a run without an adapter saves

    model = AdapterForeteller(agent, init_folder(init) if init else None)
    return TemporalPredictor(model, agent.renderer, cfg.algo.novelty, cfg.hardware.tokens_per_microbatch)


def iterate(
    cfg: RunConfig,
    run: Run,
    envs: EnvPool,
    agent: Agent,
    engine: TorchEngine,
    predictor: TemporalPredictor | None,
    iteration: int,
) -> tuple[dict[str, float], list[Trajectory]]:
    """One iteration: whole episodes, rows, update."""
    stage, algo = cfg.stage, cfg.algo
    assert isinstance(stage, PpoConfig)
    assert algo is not None
    agent.images.clear()  # what was seen before must not matter
    deals = [Deal(training_seed(cfg.seed, iteration, episode)) for episode in range(stage.episodes)]
    start = time.monotonic()
    playing = collect(
        envs,
        model_policy(cfg, agent),
        format_of(cfg, agent),
        deals,
        invalid_penalty=cfg.env.invalid_penalty,
        run_seed=run.seed_for("rollout", iteration),
    )
    trajectories = list(track(playing, f"rollout {iteration + 1}:", len(deals), "episodes"))
    collected = time.monotonic()
    peaks = peak_bytes(agent.device, "rollout")
    rng = np.random.default_rng(run.seed_for("update", iteration))
    rewarded, foretold = predictor.reward(trajectories) if predictor else (trajectories, {})
    # a critic that knows nothing yet first learns what really came: with less than 1 its own guesses would be mixed in
    credit = replace(algo, gae_lambda=1.0) if engine.critic_only else algo
    rows = build_rows(rewarded, agent.renderer, credit)
    learned = update(agent, agent.renderer, engine, rows, algo, rng, cfg.hardware.tokens_per_microbatch)
    if predictor:
        foretold |= predictor.learn(trajectories, rng)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    rollout_seconds = collected - start
    return {
        **summarise(trajectories),
        **learned,
        **foretold,
        **signal.figures(rewarded, algo.gamma),
        **peaks,
        **peak_bytes(agent.device, "update"),
        "time/rollout": rollout_seconds,
        "time/update": time.monotonic() - collected,
        "speed/env_steps_per_s": len(turns) / rollout_seconds,
        "speed/reply_tokens_per_s": sum(len(turn.reply.token_ids) for turn in turns) / rollout_seconds,
    }, trajectories


def peak_bytes(device: torch.device, phase: str) -> dict[str, float]:
    """The most memory that tensors took on a GPU since the last call, as `memory/<phase>_bytes`; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {f"memory/{phase}_bytes": float(peak)}


def evaluate(
    cfg: RunConfig,
    run: Run,
    envs: EnvPool,
    agent: Agent,
    step: int,
    album: Album,
) -> dict[str, float]:
    """The held-out panel, logged at `step`, in the end beside chance and the expert; nothing where it has no seed."""
    stage = cfg.stage
    assert isinstance(stage, PpoConfig)
    if not stage.eval_episodes:
        return {}
    agent.images.clear()
    metrics = play_model(cfg, envs, agent, stage.eval_episodes, album.keep, album.keep)
    if step == stage.iterations:
        metrics |= play_baselines(cfg, envs, stage.eval_episodes)
    run.log(step, metrics)
    say(f"eval after {step} iterations: {headline('eval', metrics)}")
    return metrics
