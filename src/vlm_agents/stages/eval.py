"""Play the held-out panel: the policy sampled and greedy, beside chance and the scripted expert. Trains nothing."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing

from vlm_agents.config import EvalConfig, RunConfig
from vlm_agents.episodes import EpisodeWriter
from vlm_agents.frames import episode_gif
from vlm_agents.progress import say
from vlm_agents.referee import Referee
from vlm_agents.remote import ChatClient
from vlm_agents.report import Result
from vlm_agents.run import Run
from vlm_agents.stages.bare import play_bare
from vlm_agents.stages.playing import (
    check_first_prompt,
    load_sampler,
    make_policy,
    open_envs,
    play_baselines,
    play_model,
    play_panel,
)
from vlm_agents.stages.remedies import tell_shortcoming, tell_unread
from vlm_agents.stages.reporting import Album, report, results, shown
from vlm_agents.summary import by_tag
from vlm_agents.types import Trajectory


def main(cfg: RunConfig, stage: EvalConfig, run: Run) -> dict[str, float]:
    album, first, ended = Album(stage.report_episodes), list[Trajectory](), 0.0
    sampler = load_sampler(cfg, stage.init) if stage.policy == "model" else None
    with open_envs(cfg.env, stage.num_envs, "always", run.world, Referee(cfg.referee, run.path("referee"))) as envs:
        if sampler:
            check_first_prompt(cfg, envs, sampler)
        if stage.policy != "remote":  # which begins with the server's first answer
            run.begin()
        run.restore()  # an interrupted evaluation starts anew
        writer = EpisodeWriter(run.dir, anew=True, world=run.world)

        def keep(trajectory: Trajectory) -> None:
            nonlocal ended
            writer.append(trajectory)
            album.keep(trajectory)
            ended = time.monotonic()
            if not first:  # for the animation
                first.append(trajectory)

        began = time.monotonic()
        if sampler:
            metrics = play_model(cfg, envs, sampler, stage.episodes, keep, album.keep, run.world)
        elif stage.policy == "remote":
            with closing(ChatClient(stage.remote, run.path("remote"), run.begin)) as client:
                policy = make_policy(cfg, "remote", client=client)
                metrics = play_panel(cfg, envs, policy, stage.episodes, on_episode=keep)
                metrics |= {f"eval/{name}": count for name, count in client.counts().items()}
                tell_unread(run.dir, client, policy=True, rater=False)
        else:
            metrics = play_panel(cfg, envs, make_policy(cfg, stage.policy), stage.episodes, on_episode=keep)
        if stage.baselines and stage.policy in ("model", "remote"):
            metrics |= play_baselines(cfg, envs, stage.episodes, album.keep_too, run.world)
    if stage.baselines and sampler:
        metrics |= play_bare(cfg, stage, run, sampler, ended - began)
    writer.sync()
    return conclude(cfg, stage, run, metrics, album, first) if run.world.main else metrics


def conclude(
    cfg: RunConfig, stage: EvalConfig, run: Run, metrics: dict[str, float], album: Album, first: Sequence[Trajectory]
) -> dict[str, float]:
    """Tell it, and write report, animation and summary."""
    run.log(0, metrics)
    tell(results(cfg, metrics), metrics)
    if stage.policy in ("model", "remote"):
        tell_shortcoming(cfg, metrics)
    page, gif = report(run, metrics, shown(album.episodes)), run.path("episode.gif")
    if first and first[0].turns:
        episode_gif(first[0], gif)
    return run.finish(metrics, {"report": page, "episodes": run.path("episodes.jsonl")})


def tell(found: Sequence[Result], metrics: Mapping[str, float]) -> None:
    """A line for each policy, and for each tag."""
    for result in found:
        share, low, high = result.success
        figures = {"success (95 %)": f"{share:.3f} [{low:.3f}, {high:.3f}]"}
        figures |= {words: f"{value:.3f}" for words, value in result.others.items() if value is not None}
        say("  ".join(f"{words}: {figure}" for words, figure in {"policy": result.policy, **figures}.items()))
    if unscored := metrics.get("eval/unscored"):
        say(f"in no figure: {unscored:.0f} episodes whose answer has no verdict")
    if errors := metrics.get("eval/env_errors"):
        say(f"in no figure: {errors:.0f} episodes that an error of the env ended; the warnings above say which")
    for tag, values in by_tag(metrics).items():
        shares = (f"{value} {share:.3f} ({episodes})" for value, (share, episodes) in values.items())
        say(f"policy: {found[0].policy}  success by {tag} (episodes): {', '.join(shares)}")
