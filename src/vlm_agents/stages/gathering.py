"""The episodes of an iteration: groups of plays of its own starts, in waves, until enough of them are kept."""

import numpy as np

from vlm_agents import imports
from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.learn.learner import Learner
from vlm_agents.policies import Policy
from vlm_agents.progress import track
from vlm_agents.run import Run
from vlm_agents.seeds import Deal, training_seed
from vlm_agents.stages.playing import RefereedPool, play
from vlm_agents.types import Trajectory


def gather(
    cfg: RunConfig, stage: PpoConfig, run: Run, envs: RefereedPool, policy: Policy, learner: Learner
) -> tuple[list[Trajectory], list[Trajectory], dict[str, float]]:
    """Whole episodes for the learner's next iteration: as they were played, as they are learned from, and what the
    shapers tell of them, a mean over waves.

    A further wave is played while fewer than `stage.episodes` are kept, `algo.waves` in all at most.
    """
    assert cfg.algo is not None
    played: list[Trajectory] = []
    shaped: list[Trajectory] = []
    told: list[dict[str, float]] = []
    for wave in range(cfg.algo.waves):
        trajectories = play_wave(cfg, stage, run, envs, policy, learner.iteration, wave)
        bonused, figures = learner.shape(trajectories)
        played, shaped, told = played + trajectories, shaped + bonused, [*told, figures]
        with imports.blamed("algo.factory", cfg.algo.factory):
            kept = learner.kept(shaped, stage.episodes)
        if len(kept) >= stage.episodes:
            break
    names = dict.fromkeys(name for figures in told for name in figures)
    return played, shaped, {name: float(np.mean([one[name] for one in told if name in one])) for name in names}


def play_wave(
    cfg: RunConfig, stage: PpoConfig, run: Run, envs: RefereedPool, policy: Policy, iteration: int, wave: int
) -> list[Trajectory]:
    """Starts that no other wave or iteration plays, each as often as a group is large."""
    algo = cfg.algo
    assert algo is not None
    starts = algo.played(stage.episodes) // algo.group_size
    seeds = (training_seed(cfg.seed, iteration, start) for start in range(wave * starts, (wave + 1) * starts))
    deals = [Deal(seed, member) for seed in seeds for member in range(algo.group_size)]
    # the expert is asked at every turn only where that is learned from; else for rollout/steps_over_expert alone
    advice = "always" if algo.advised else "first"
    playing = play(cfg, envs, policy, deals, run.seed_for("rollout", iteration), advice, run.world)
    return list(track(playing, f"rollout {iteration + 1}:", len(deals), "episodes"))
