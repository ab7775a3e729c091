"""Play the held-out panel: the policy sampled and greedy, beside chance and the scripted expert. Trains nothing."""

from contextlib import closing

from vlm_agents.config import EvalConfig, RunConfig
from vlm_agents.episodes import EpisodeWriter
from vlm_agents.progress import say
from vlm_agents.prompting import make_format
from vlm_agents.remote import ChatClient
from vlm_agents.report import episode_gif, write_report
from vlm_agents.run import Run
from vlm_agents.stages.playing import (
    has_expert,
    open_envs,
    play_model,
    play_panel,
    remote_policy,
    scripted_policy,
    tell_unread,
)
from vlm_agents.types import Trajectory

NAMES = {"": "model, sampled", "_greedy": "model, greedy", "_random": "random", "_expert": "expert"}


def main(cfg: RunConfig, run: Run) -> dict[str, float]:
    stage = cfg.stage
    assert isinstance(stage, EvalConfig)
    prompt_format = make_format(cfg.prompt)
    advised = has_expert(cfg.env)
    shown: list[Trajectory] = []
    agent = None
    if stage.policy == "model":
        from vlm_agents.models import load_agent  # brings torch along: seconds that the other policies save

        say(f"the weights are those of {stage.init or f'model={cfg.model.name}: stage.init names no others'}")
        agent = load_agent(cfg.model, cfg.hardware, stage.init)
    run.begin()
    with open_envs(cfg.env, stage.num_envs, advised) as envs:
        run.restore()  # an interrupted evaluation starts anew
        writer = EpisodeWriter(run.dir, anew=True)

        def keep(trajectory: Trajectory) -> None:
            writer.append(trajectory)
            if len(shown) < max(1, stage.report_episodes):  # the animation takes the first
                shown.append(trajectory)

        if agent is not None:
            metrics = play_model(cfg, envs, agent, stage.episodes, keep)
        elif stage.policy == "remote":
            with closing(ChatClient(stage.remote, run.path("remote"))) as client:
                policy = remote_policy(cfg, client, samples=1)  # like the model, it has one try a turn
                metrics = play_panel(cfg, envs, policy, stage.episodes, on_episode=keep)
                metrics |= {f"eval/{name}": count for name, count in client.counts().items()}
                tell_unread(run.dir, client, policy=True, rater=False)
        else:
            policy = scripted_policy(stage.policy, prompt_format)
            metrics = play_panel(cfg, envs, policy, stage.episodes, on_episode=keep)
        compared = stage.baselines and stage.policy in ("model", "remote")
        baselines = ["random", *(["expert"] if advised else [])] if compared else []
        for name in baselines:
            metrics |= play_panel(cfg, envs, scripted_policy(name, prompt_format), stage.episodes, f"_{name}")
    writer.sync()
    run.log(0, metrics)
    table = [
        {
            "policy": name if stage.policy == "model" or suffix else stage.policy,
            "success (95 %)": "{:.3f} [{:.3f}, {:.3f}]".format(
                *(metrics[f"eval/success{bound}{suffix}"] for bound in ("", "_low", "_high"))
            ),
            "return": f"{metrics[f'eval/return{suffix}']:.3f}",
            "turns": f"{metrics[f'eval/episode_length{suffix}']:.1f}",
            "loops": f"{metrics[f'eval/loop_rate{suffix}']:.3f}",
        }
        for suffix, name in NAMES.items()
        if f"eval/success{suffix}" in metrics
    ]
    for line in table:
        say("  ".join(f"{key}: {value}" for key, value in line.items()))
    report, gif = run.path("report.html"), run.path("episode.gif")
    write_report(
        report,
        title=f"eval: {cfg.env.id}",
        subtitle=f"{stage.episodes} held-out seeds, {stage.policy}" + (f" of {stage.init}" if stage.init else ""),
        metrics={name: value for name, value in metrics.items() if not name.endswith(("_random", "_expert"))},
        curves={},
        episodes=shown[: stage.report_episodes],
        table=table,
    )
    if shown[0].turns:
        episode_gif(shown[0], gif)
    return run.finish(metrics, {"report": report, "episodes": run.path("episodes.jsonl")})
