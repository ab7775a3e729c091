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

from vlm_agents.config import AlgoConfig, PpoConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.episodes import EpisodeWriter, read_episodes
from vlm_agents.errors import ConfigError
from vlm_agents.learn.batch import rows as build_rows
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.novelty import TemporalPredictor
from vlm_agents.learn.update import update
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.loading import ADAPTER_FILE, RUN_MODEL, init_folder
from vlm_agents.progress import say, track
from vlm_agents.report import captioned_frame, read_curves, write_report
from vlm_agents.rollout import collect, summarise
from vlm_agents.run import Run, seed_everything, training_seed
from vlm_agents.stages.cards import save_model
from vlm_agents.stages.playing import SHARES, format_of, has_expert, model_policy, open_envs, play_model
from vlm_agents.types import Trajectory

RECORDED = 4  # episodes of each iteration kept in episodes.jsonl
REPORTED = 12  # episodes in report.html
CURVES = ("rollout/success", "rollout/return", "ppo/approx_kl", "ppo/entropy", "ppo/explained_variance", "eval/success")
OPTIMIZER = "optimizer.pt"
PREDICTOR = "temporal_predictor.pt"


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    stage, algo = cfg.stage, cfg.algo
    assert isinstance(stage, PpoConfig)
    assert algo is not None
    check_reference(stage, algo)
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

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            agent.save(folder / RUN_MODEL)
            for name, learner in learners.items():
                torch.save(learner.state_dict(), folder / name)

        writer.sync()
        run.save_checkpoint(step, write, state, stage.keep_checkpoints)

    run.begin()
    with open_envs(cfg.env, stage.num_envs, has_expert(cfg.env)) as envs:
        if stage.eval_episodes and not checkpoint:
            state["before"], _ = evaluate(cfg, run, envs, agent, 0)
            save(0)
        for iteration in range(checkpoint.step if checkpoint else 0, stage.iterations):
            state["last"], trajectories = iterate(cfg, run, envs, agent, engine, predictor, iteration)
            state["training_seconds"] += state["last"]["time/rollout"] + state["last"]["time/update"]
            tell(run, iteration, stage.iterations, state["last"], trajectories[0])
            writer.append(*trajectories[:RECORDED])
            done = iteration + 1
            if stage.eval_episodes and stage.eval_every and done % stage.eval_every == 0 and done < stage.iterations:
                evaluate(cfg, run, envs, agent, done)
            if done % stage.checkpoint_every == 0 or done == stage.iterations:
                save(done)
        after, shown = evaluate(cfg, run, envs, agent, stage.iterations) if stage.eval_episodes else ({}, [])
    first = next(read_episodes(run.dir, skip_damaged=True), None)
    prompt = first.turns[0].prompt if first and first.turns else None
    save_model(run, agent.save, {**after, **before_of(state)}, prompt, cfg.prompt.format)
    return finish(cfg, run, state, after, shown)


def check_reference(stage: PpoConfig, algo: AlgoConfig) -> None:
    """Switching the adapter off must give the policy that training started from."""
    if algo.kl_coef > 0 and stage.init and (init_folder(stage.init) / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"algo.kl_coef > 0 holds the policy near the one that it starts from, and stage.init={stage.init} is an "
            "adapter that training would change: merge it into its model first (stage=merge), or set algo.kl_coef=0"
        )


def before_of(state: dict[str, Any]) -> dict[str, float]:
    """The held-out panel before training."""
    return {f"{name}_before": value for name, value in state["before"].items() if name.startswith(SHARES)}


def finish(
    cfg: RunConfig, run: Run, state: dict[str, Any], after: dict[str, float], shown: list[Trajectory]
) -> dict[str, float]:
    """Report and summary: the last iteration's metrics, and the held-out panel after and before."""
    metrics = {**state["last"], **after, **before_of(state), "time/training": state["training_seconds"]}
    report = run.path("report.html")
    write_report(
        report,
        title=f"ppo: {cfg.env.id}",
        subtitle=f"run {cfg.name}, seed {cfg.seed}",
        metrics={name: value for name, value in metrics.items() if name.startswith(("eval/", "time/"))},
        curves=read_curves(run.path("metrics.jsonl"), CURVES),
        episodes=shown or list(deque(read_episodes(run.dir, skip_damaged=True), RECORDED)),
    )
    return run.finish(metrics, {"model": run.path(RUN_MODEL), "report": report, "episodes": run.path("episodes.jsonl")})


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
    seeds = [training_seed(cfg.seed, iteration, episode) for episode in range(stage.episodes)]
    start = time.monotonic()
    playing = collect(
        envs,
        model_policy(cfg, agent),
        format_of(cfg, agent),
        seeds,
        invalid_penalty=cfg.env.invalid_penalty,
        run_seed=run.seed_for("rollout", iteration),
    )
    trajectories = list(track(playing, f"rollout {iteration + 1}", len(seeds)))
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
    cfg: RunConfig, run: Run, envs: EnvPool, agent: Agent, step: int
) -> tuple[dict[str, float], list[Trajectory]]:
    """The held-out panel, logged at `step`, and its first episodes."""
    assert isinstance(cfg.stage, PpoConfig)
    agent.images.clear()
    shown: list[Trajectory] = []

    def keep(trajectory: Trajectory) -> None:
        if len(shown) < REPORTED:
            shown.append(trajectory)

    metrics = play_model(cfg, envs, agent, cfg.stage.eval_episodes, keep)
    run.log(step, metrics)
    say(
        f"eval after {step} iterations: success {metrics['eval/success']:.3f} sampled "
        f"[{metrics['eval/success_low']:.3f}, {metrics['eval/success_high']:.3f}], "
        f"{metrics['eval/success_greedy']:.3f} greedy"
    )
    return metrics, shown


def tell(run: Run, iteration: int, iterations: int, metrics: dict[str, float], shown: Trajectory) -> None:
    """Log an iteration, print a line of it, and keep the last turn of one episode as a picture."""
    run.log(iteration + 1, metrics)
    seconds = metrics["time/rollout"] + metrics["time/update"]
    say(
        f"iteration {iteration + 1:3d}/{iterations}  success {metrics['rollout/success']:.2f}  "
        f"return {metrics['rollout/return']:.2f}  turns {metrics['rollout/episode_length']:.1f}  "
        f"invalid {metrics['rollout/invalid_rate']:.3f}  kl {metrics['ppo/approx_kl']:.4f}  {seconds:.0f} s"
    )
    if shown.turns:
        last = len(shown.turns) - 1
        run.image("rollout/last_turn", captioned_frame(shown.turns[last], last), iteration + 1)
