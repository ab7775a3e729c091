"""Waves of groups: how many are played, of which starts, and that a run goes on among them."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from vlm_agents.config import PpoConfig, RunConfig
from vlm_agents.errors import ConfigError
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.shaping import Shaper
from vlm_agents.models import HFSampler, load_agent
from vlm_agents.run import Run
from vlm_agents.stages.gathering import PlayerInTurn, as_asked, gather
from vlm_agents.stages.learning import make_learner
from vlm_agents.stages.playing import make_policy, open_envs
from vlm_agents.types import Trajectory

ComposeRun = Callable[..., RunConfig]
RunStage = Callable[..., Path]
Gathered = tuple[list[Trajectory], list[Trajectory], dict[str, float]]


class Waves(Shaper):
    """Tells which wave it was given, from 1 on."""

    def __init__(self) -> None:
        self.waves = 0

    def reward(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], dict[str, float]]:
        self.waves += 1
        return list(trajectories), {"wave": float(self.waves)}


@pytest.fixture
def gathering(echo_run: ComposeRun, tmp_path: Path) -> Callable[..., tuple[Learner, Gathered]]:
    """Gathers an iteration of random play, which is right one time in four."""

    def gathered(*words: str, iteration: int = 0) -> tuple[Learner, Gathered]:
        words = ("env.turns=1", "algo=grpo", "algo.group_size=2", "stage.episodes=8", "algo.filters=[outcome]", *words)
        cfg = echo_run(tmp_path, "stage=ppo", *words)
        assert cfg.algo is not None
        assert isinstance(cfg.stage, PpoConfig)
        agent = load_agent(cfg.model, cfg.hardware, None)
        learner = make_learner(cfg, cfg.algo, agent, None, 10)
        learner.shapers, learner.iteration = {"waves": Waves()}, iteration
        with Run.open(cfg, []) as run, open_envs(cfg.env, 8, "never") as envs:
            player = PlayerInTurn(cfg, cfg.stage, run, envs, make_policy(cfg, "random"), HFSampler(agent))
            return learner, gather(cfg, cfg.stage, player, learner)

    return gathered


def test_waves_of_other_starts_are_played_until_enough_is_kept(gathering: Callable[..., tuple[Learner, Gathered]]):
    learner, (played, shaped, told) = gathering("algo.waves=9")
    waves = len(played) // 8
    assert 1 < waves < 9  # of 4 groups, each with two different outcomes with probability 3/8
    assert len(learner.kept(shaped, 8)) == 8
    assert len(learner.kept(shaped[: 8 * (waves - 1)], 8)) < 8
    assert set(Counter(one.seed for one in played).values()) == {2}
    assert told == {"wave": (waves + 1) / 2}  # a mean over waves
    again, other = (gathering("algo.waves=9", iteration=iteration)[1][0] for iteration in (0, 1))
    assert again == played
    assert not {one.seed for one in other} & {one.seed for one in played}


def test_no_more_waves_are_played_than_are_allowed(gathering: Callable[..., tuple[Learner, Gathered]]):
    for words, played in ((["algo.waves=1"], 8), (["algo.waves=1", "algo.oversample=1.5"], 12)):
        assert len(gathering(*words)[1][0]) == played


def test_nobody_plays_ahead_of_a_critic_of_ones_own(compose_run: ComposeRun):
    words = ("rollout=vllm", "model/lora=adapter", "algo=grpo", "algo.correction=mask", "algo.factory=mine:make")
    cfg, nobody = compose_run("stage=ppo", "stage.staleness=1", *words), cast(Any, None)
    assert isinstance(cfg.stage, PpoConfig)
    with pytest.raises(ConfigError, match="brings a critic"):
        as_asked(cfg.stage, nobody, nobody, critic=True)


# ---- in a run --------------------------------------------------------------------------------------------------------
SMALL = ("stage=ppo", "algo=dapo", "algo.group_size=2", "algo.waves=2", "stage.episodes=4", "stage.num_envs=8")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_its_env_steps(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """No reply of random weights is legal, so nothing is kept, and each iteration plays 2 waves of 4 episodes of 3
    turns. 30 turns are passed after two; the panel isn't played twice then, and that is a checkpoint's moment."""
    words = ("stage.iterations=9", "stage.env_steps=30", "stage.eval_episodes=1", "stage.eval_every=1")
    run_stage(tmp_path, *SMALL, *words, "stage.checkpoint_every=5")
    told = lines(tmp_path)
    assert [line["rollout/env_steps"] for line in told if "rollout/env_steps" in line] == [24, 48]
    assert [line["step"] for line in told if "eval/success" in line] == [0, 1, 2]
    assert (told[-2]["ppo/kept"], told[-2]["ppo/updates"]) == (0, 0)
    assert (tmp_path / "checkpoints/step_000002").is_dir()
    assert "algo.filters kept nothing" in capsys.readouterr().err


def test_a_run_goes_on_in_the_middle_as_if_it_had_not_stopped(run_stage: RunStage, tmp_path: Path):
    """What it counts goes on: states that were reached, env steps, iterations in which nothing was to be learned."""
    words = ("algo.filters=[rank]", "algo.count_coef=0.1", "stage.iterations=9", "stage.env_steps=30")
    words = (*SMALL, *words, "stage.eval_episodes=1", "stage.checkpoint_every=1", "stage.keep_checkpoints=9")
    run_stage(tmp_path, *words)
    whole = lines(tmp_path)
    assert [line["ppo/updates"] for line in whole if "ppo/updates" in line] == [1, 1, 1]
    (tmp_path / "DONE").unlink()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoints/step_{step:06d}")
    run_stage(tmp_path, *words)

    def timeless(told: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: it for name, it in line.items() if not name.startswith(("time/", "speed/"))} for line in told]

    assert timeless(lines(tmp_path)) == timeless(whole)
