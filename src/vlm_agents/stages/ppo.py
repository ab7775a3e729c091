"""Reinforcement learning: collect whole episodes, learn from them, and again; evaluate before and after.

Between iterations a run is weights, optimizers and counters, nothing else: every random draw is seeded by
(run seed, iteration). That is what makes resuming exact.
"""

from typing import Any

import numpy as np

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.env_pool import EnvPool
from vlm_agents.episodes import LINES, EpisodeWriter
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.outcomes import PANEL
from vlm_agents.policies import Policy
from vlm_agents.progress import say, track
from vlm_agents.rollout import collect
from vlm_agents.run import Run, seed_everything
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.learning import Clock, load, make_learner, save
from vlm_agents.stages.panel import RECORDED, Panel, finish
from vlm_agents.stages.playing import check_first_prompt, make_policy, open_envs
from vlm_agents.stages.reporting import tell
from vlm_agents.stages.watch import Watch
from vlm_agents.summary import summarise
from vlm_agents.types import Trajectory


def main(cfg: RunConfig, stage: PpoConfig, run: Run) -> dict[str, float]:
    algo = cfg.algo
    assert algo is not None
    run.append_only(LINES)
    run.append_only(PANEL)
    checkpoint = run.restore()
    seed_everything(cfg.seed)
    init = str(checkpoint.path) if checkpoint else stage.init
    agent = load_agent(cfg.model, cfg.hardware, init)
    sampler = HFSampler(agent)
    policy = make_policy(cfg, "model", sampler)
    learner = make_learner(cfg, algo, agent, init, stage.iterations)
    state: dict[str, Any] = {"before": {}, "last": {}, "training_seconds": 0.0, "watch": (0, False)}
    if checkpoint:
        load(checkpoint, learner)
        state |= checkpoint.state
        say(checkpoint.told("iteration", stage.iterations))
    watch = Watch(cfg, stage.iterations, *state["watch"])
    writer, panel = EpisodeWriter(run.dir), Panel(cfg, stage, run, sampler)
    with open_envs(cfg.env, stage.num_envs, "always") as envs:
        check_first_prompt(cfg, envs, sampler)
        run.begin()
        if stage.eval_episodes and not checkpoint:
            state["before"] = panel.before(envs)
            save(run, agent, learner, 0, state, stage.keep_checkpoints)
        for iteration in range(learner.iteration, stage.iterations):
            clock = Clock(agent.device)
            with clock.phase("rollout"):
                sampler.sync()
                trajectories = play(cfg, stage, run, envs, policy, iteration)
            with clock.phase("update"):
                shaped, told = learner.shape(trajectories)
                learned = told | learner.learn(shaped, np.random.default_rng(run.seed_for("update", iteration)))
            last = {**summarise(trajectories), **learned, **clock.figures()}
            state["last"] = last | speeds(trajectories, clock.seconds["rollout"])
            state["training_seconds"] += sum(clock.seconds.values())
            tell(run, iteration, stage.iterations, state["last"], trajectories[0])
            watch.look(iteration, state["last"], trajectories)
            state["watch"] = watch.lacked, watch.told
            writer.append(*shaped[:RECORDED])
            panel.now_and_then(envs, iteration + 1)
            if (iteration + 1) % stage.checkpoint_every == 0 or iteration + 1 == stage.iterations:
                writer.sync()
                save(run, agent, learner, iteration + 1, state, stage.keep_checkpoints)
        after, album = panel.after(envs)
    last = state["last"] | {"time/training": state["training_seconds"]}
    return finish(run, agent, last, state["before"], after, album)


def play(cfg: RunConfig, stage: PpoConfig, run: Run, envs: EnvPool, policy: Policy, iteration: int) -> list[Trajectory]:
    """Whole episodes of the iteration's own seeds."""
    deals = [Deal(training_seed(cfg.seed, iteration, episode)) for episode in range(stage.episodes)]
    playing = collect(
        envs,
        policy,
        deals,
        invalid_penalty=cfg.env.invalid_penalty,
        run_seed=run.seed_for("rollout", iteration),
        advice="first",  # all that rollout/steps_over_expert asks for
    )
    return list(track(playing, f"rollout {iteration + 1}:", len(deals), "episodes"))


def speeds(trajectories: list[Trajectory], seconds: float) -> dict[str, float]:
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    tokens = sum(len(turn.reply.token_ids) for turn in turns)
    return {"speed/env_steps_per_s": len(turns) / seconds, "speed/reply_tokens_per_s": tokens / seconds}
