"""What a person is told when little came of a run: what it lacks, and what helps."""

import os
from collections.abc import Mapping
from pathlib import Path

from vlm_agents.config import RunConfig
from vlm_agents.episodes import read_episodes
from vlm_agents.lineage import cloned_in, differences
from vlm_agents.metrics import shortcoming
from vlm_agents.progress import say
from vlm_agents.remote import ChatClient
from vlm_agents.weights import has_model


def tell_unread(folder: Path, client: ChatClient, policy: bool, rater: bool) -> int:
    """Say how much of what a server was asked for the episodes in `folder` came to nothing, as `policy` or as `rater`.

    Returns how many steps have no rating.
    """
    turns = played = illegal = unrated = 0
    for trajectory in read_episodes(folder, pictures=False):
        for turn in trajectory.turns:
            turns += 1
            played += turn.reply.source != "random"
            illegal += turn.parsed.action is None
            unrated += turn.rating is None
    missing = [f"{illegal} of {played} replies hold no legal action"] if policy and illegal else []
    missing += [f"{unrated} of {turns} steps have no rating"] if rater and unrated else []
    if missing:
        say(f"{' and '.join(missing)}: {client.why_unread()}")
    return unrated


def tell_shortcoming(cfg: RunConfig, metrics: Mapping[str, float]) -> None:
    """Say, by its held-out panel, that what played is no agent yet, and what may help; nothing where it is one."""
    if lack := shortcoming(metrics):
        remedies = [*demonstrations(cfg), *success_remedy(cfg, metrics.get("eval/success", 1.0))]
        say(f"no agent yet: {lack}. What helps: {'; '.join(remedies)}")


def success_remedy(cfg: RunConfig, success: float) -> list[str]:
    """What the env's settings may have to do with it, where `success`, of episodes, is 0; else nothing."""
    return [cfg.env.success_remedy] if cfg.env.success_remedy and not success else []


def demonstrations(cfg: RunConfig) -> list[str]:
    """What a policy needs to start from, by where its weights come from."""
    if not has_model(cfg):
        return ["another model on the server", "another prompt="]
    if told := differences(cfg):
        return [f"settings as the weights learned them ({told[0]})"]
    if run := cloned_in(cfg):
        return [
            f"more demonstrations (stage=collect stage.episodes=) and more steps (stage.epochs=) than "
            f"{os.path.relpath(run)} had",
            "a look at report.html: where failures first left the expert's way",
        ]
    return ["train with stage=sft first, and give its run as stage.init", "another prompt="]
