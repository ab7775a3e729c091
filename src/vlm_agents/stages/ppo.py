"""Reinforcement learning: collect whole episodes, learn from them, and again; evaluate before and after.

Between iterations a run is weights, optimizers and counters, nothing else: every random draw is seeded by
(run seed, iteration). That is what makes resuming exact. (With stage.staleness a server may be playing then; a run that
is resumed plays that iteration anew.)
"""

from vlm_agents import imports
from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.episodes import LINES, EpisodeWriter
from vlm_agents.models import load_agent
from vlm_agents.outcomes import PANEL
from vlm_agents.referee import Referee
from vlm_agents.run import Run, seed_everything
from vlm_agents.stages.collapse import Collapse
from vlm_agents.stages.gathering import PlayerInTurn, as_asked, gather
from vlm_agents.stages.learning import (
    Clock,
    TrainingState,
    best_of,
    figures,
    load,
    make_learner,
    save,
    tell_unmoved,
    training_sampler,
)
from vlm_agents.stages.panel import RECORDED, Panel, finish
from vlm_agents.stages.playing import check_first_prompt, make_policy, open_envs
from vlm_agents.stages.reporting import tell
from vlm_agents.stages.watch import Watch
from vlm_agents.summary import bonuses


def main(cfg: RunConfig, stage: PpoConfig, run: Run) -> dict[str, float]:
    assert cfg.algo is not None
    run.append_only(LINES, PANEL)
    checkpoint = run.restore()
    seed_everything(cfg.seed)
    init = str(checkpoint.path) if checkpoint else stage.init
    agent = load_agent(cfg.model, cfg.hardware, init)
    learner = make_learner(cfg, cfg.algo, agent, init, stage.iterations, run.world)
    state = load(checkpoint, learner, stage.iterations) if checkpoint else TrainingState()
    watch, collapse = Watch(cfg, *state.watch), Collapse(stage.stop_on_collapse, state.collapse)
    writer = EpisodeWriter(run.dir, world=run.world)
    with (
        training_sampler(cfg, agent, learner, run.path("rollout"), run.world) as sampler,
        open_envs(cfg.env, stage.num_envs, "always", run.world, Referee(cfg.referee, run.path("referee"))) as envs,
        as_asked(
            stage,
            PlayerInTurn(cfg, stage, run, envs, make_policy(cfg, "model", sampler), sampler),
            sampler,
            critic=learner.critic is not None,
        ) as player,
    ):
        panel = Panel(cfg, stage, run, sampler, learner.whole)
        check_first_prompt(cfg, envs, sampler)
        run.begin()
        if stage.eval_episodes and not checkpoint:
            state.before = panel.before(envs)
            save(run, agent, learner, 0, state, stage.keep_checkpoints)
        while not state.over(learner.iteration, stage):
            iteration, clock = learner.iteration, Clock(agent.device, envs.stopwatch, sampler.stopwatch)
            with clock.phase("rollout"), learner.whole():
                with player.synced():
                    played, shaped, told = gather(cfg, stage, player, learner)
                state.env_steps += sum(len(one.turns) for one in played)
                last = state.over(iteration + 1, stage)
                if not last and not panel.due(iteration + 1):
                    player.begin(iteration + 1)
            with clock.phase("update"), imports.blamed("algo.factory", cfg.algo.factory):
                told |= learner.learn(shaped, stage.episodes, run.rng("update", iteration))
            told = bonuses(shaped) | player.figures() | told
            state.last = figures(played, state.env_steps, told, clock, player.seconds)
            state.training_seconds += sum(clock.seconds.values())
            tell(run, iteration, stage.iterations, state.last, played[0])
            watch.look(state.last, played, only=last and iteration == 0)
            collapse.look(iteration, state.last, run.latest_checkpoint)
            state.best = best_of(run, stage, state.best, iteration, state.last["rollout/success"])
            state.watch, state.collapse = (watch.lacked, watch.told), collapse.state
            writer.append(*shaped[:RECORDED])
            if not last and panel.due(iteration + 1):
                panel.now_and_then(envs, iteration + 1)
            stopping = run.asked_to_stop() and not last
            due = last or stopping or (iteration + 1) % stage.checkpoint_every == 0
            if due and not collapse.suspected:
                writer.sync()
                save(run, agent, learner, iteration + 1, state, stage.keep_checkpoints)
            if stopping:
                run.stop()
        tell_unmoved(learner, stage)
        after, album = panel.after(envs, learner.iteration)
    with learner.whole():
        return finish(run, agent, state.last | {"time/training": state.training_seconds}, state.before, after, album)
