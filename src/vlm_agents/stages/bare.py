"""What help is worth: the panel played by the same policy without it, once, and by vote in as much time."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from vlm_agents.config import EvalConfig, RunConfig
from vlm_agents.policies import Sampler
from vlm_agents.prompting import WITHOUT_TOOL
from vlm_agents.referee import Referee
from vlm_agents.run import Run
from vlm_agents.seeds import Deal, panel_seeds
from vlm_agents.stages.playing import EVAL_SEED, make_policy, open_envs, play, play_panel, with_bounds
from vlm_agents.types import Trajectory
from vlm_agents.verdicts import canonical

MOST_VOTES = 15  # of a question


def play_bare(cfg: RunConfig, stage: EvalConfig, run: Run, sampler: Sampler, seconds: float) -> dict[str, float]:
    """The panel without help: metrics end in `_bare`, and in `_votes` where the most frequent of several answers
    counts, of as many as take the `seconds` of the panel with help. {} where the env has no help to leave out.
    """
    env = cfg.env.bare
    if env is None:
        return {}
    asked = WITHOUT_TOOL.get(cfg.prompt.format, cfg.prompt.format)
    cfg = replace(cfg, env=env, prompt=replace(cfg.prompt, format=asked))
    policy = make_policy(cfg, "model", sampler)
    with open_envs(env, stage.num_envs, "never", run.world, Referee(cfg.referee, run.path("referee"))) as envs:
        played, began = list[Trajectory](), time.monotonic()
        metrics = play_panel(cfg, envs, policy, stage.episodes, "_bare", played.append, run.world)
        bare_seconds = time.monotonic() - began
        votes = run.world.of_main(lambda: max(1, min(MOST_VOTES, round(seconds / bare_seconds))))
        if votes > 1:
            seeds = panel_seeds(envs.name, stage.episodes)
            deals = [Deal(seed, member) for seed in seeds for member in range(1, votes)]
            played += play(cfg, envs, policy, deals, EVAL_SEED, world=run.world)
    won = elected(played)
    metrics |= with_bounds("eval/success", sum(won) / len(won), len(won), "_votes")
    return metrics | {"eval/votes": float(votes), "time/panel": seconds, "time/panel_bare": bare_seconds}


def elected(episodes: Sequence[Trajectory]) -> list[bool]:
    """For each start, is the most frequent of its plays' answers right? Of those that are as frequent the first."""
    answers: defaultdict[int, Counter[str]] = defaultdict(Counter)
    right: dict[tuple[int, str], bool] = {}
    for episode in episodes:
        claim = episode.turns[-1].step.claim if episode.turns else None
        if episode.known:
            answer = canonical(claim) if claim else ""
            answers[episode.seed][answer] += bool(claim)  # who says nothing has no vote
            right[episode.seed, answer] = episode.success
    return [right[seed, counts.most_common(1)[0][0]] for seed, counts in answers.items()]
