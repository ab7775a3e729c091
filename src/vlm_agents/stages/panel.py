"""The held-out panel of a training run: played before, now and then, and after; and the run's end, which it decides."""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.episodes import LINES, read_episodes
from vlm_agents.metrics import headline
from vlm_agents.models import Agent
from vlm_agents.outcomes import append_outcome
from vlm_agents.policies import Sampler
from vlm_agents.progress import say
from vlm_agents.run import Run
from vlm_agents.stages.cards import save_model
from vlm_agents.stages.playing import SHARES, RefereedPool, play_baselines, play_model
from vlm_agents.stages.reporting import Album, remember, remembered, report, shown
from vlm_agents.stages.watch import conclude
from vlm_agents.types import Trajectory
from vlm_agents.weights import RUN_MODEL

RECORDED = 4  # episodes of each iteration kept in episodes.jsonl


class Panel:
    """Plays and tells."""

    def __init__(
        self,
        cfg: RunConfig,
        stage: PpoConfig,
        run: Run,
        sampler: Sampler,
        whole: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.cfg, self.stage, self.run, self.sampler, self.whole = cfg, stage, run, sampler, whole

    def before(self, envs: RefereedPool) -> dict[str, float]:
        """Before training; its episodes are kept for the report."""
        metrics = self._play(envs, 0, album := Album())
        remember(self.run, album)
        return metrics

    def due(self, done: int) -> bool:
        """Is it time for it after `done` iterations, which aren't all?"""
        stage = self.stage
        return stage.eval_episodes > 0 and stage.eval_every > 0 and done % stage.eval_every == 0

    def now_and_then(self, envs: RefereedPool, done: int) -> None:
        """After `done` iterations, where it is due."""
        self._play(envs, done, Album(first=0))

    def after(self, envs: RefereedPool, done: int) -> tuple[dict[str, float], Album]:
        """After training, of `done` iterations, beside chance and the expert."""
        album = Album()
        return self._play(envs, done, album, last=True) if self.stage.eval_episodes else {}, album

    def _play(self, envs: RefereedPool, step: int, album: Album, last: bool = False) -> dict[str, float]:
        def record(episode: Trajectory) -> None:
            append_outcome(self.run.dir, step, episode)

        def keep(episode: Trajectory) -> None:
            record(episode)
            album.keep(episode)

        with self.whole():
            metrics = play_model(self.cfg, envs, self.sampler, self.stage.eval_episodes, keep, keep, self.run.world)
        if last:
            metrics |= play_baselines(self.cfg, envs, self.stage.eval_episodes, record, self.run.world)
        self.run.log(step, metrics)
        say(f"eval after {step} iterations: {headline('eval', metrics)}")
        return metrics


def finish(
    run: Run,
    agent: Agent,
    last: Mapping[str, float],
    before: Mapping[str, float],
    after: Mapping[str, float],
    album: Album,
) -> dict[str, float]:
    """Model, report and summary, from the last iteration's metrics and the panel's before and after training."""
    was = {f"{name}_before": value for name, value in before.items()}
    first = next(read_episodes(run.dir, skip_damaged=True), None)
    prompt = first.turns[0].prompt if first and first.turns else None
    save_model(run, agent.save, {**after, **was}, prompt, run.cfg.prompt.format)
    metrics = {**last, **after, **was}
    conclude(run.cfg, metrics)
    recorded = deque(read_episodes(run.dir, skip_damaged=True), RECORDED)
    episodes = [*shown(album.episodes, "after training"), *remembered(run)] or shown(recorded)
    artifacts = {"model": run.path(RUN_MODEL), "report": report(run, metrics, episodes), "episodes": run.path(LINES)}
    kept = {name: value for name, value in metrics.items() if name not in was or name.startswith(SHARES)}
    return run.finish(kept, artifacts)
