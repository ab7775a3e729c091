"""Every algorithm finds out, from the reward alone, what no data told it: the names of four colours.

The model first learns the format from random play, in which an answer is right one time in four. PPO takes half a
minute on one core; the others are marked slow.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_agents.config import conf_dir, groups

RunStage = Callable[..., Path]
GAME = ("env=echo", "env.turns=1", "prompt.max_reply_tokens=8")
RARELY = "stage.checkpoint_every=100"  # before and after alone: those between take a third of the time
CRITICS = ("ppo", "ppo_token", "vl_dac", "bilevel_ppo", "rlef")
WITH_CRITIC = (
    "model/train=all",
    "algo.lr=7e-4",
    "algo.minibatch_turns=48",
    "algo.epochs=2",
    "algo.min_lr_ratio=0.3",
    "stage.iterations=16",
)
# Slower where nothing says what to expect: soon all plays of a start name the same colour, and then nothing is learned.
WITHOUT = ("model/train=all", "algo.lr=1.5e-4", "algo.minibatch_turns=24", "algo.min_lr_ratio=1", "stage.iterations=48")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(groups()["algo"]) if name != "ppo"]


@pytest.fixture(scope="module")
def guesser(run_stage: RunStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage=sft: knows how to answer, and nothing about colours."""
    played, chats, trained = (tmp_path_factory.mktemp(name) for name in ("collect", "preprocess", "sft"))
    run_stage(played, "stage=collect", *GAME, "stage.policy=random", "stage.episodes=300", "stage.num_envs=8")
    run_stage(
        chats, "stage=preprocess", *GAME, f"stage.data=[{played}]", "stage.label=played", "stage.success_only=false"
    )
    words = (f"stage.data={chats}", "stage.epochs=6", "stage.batch_size=16", "stage.warmup_steps=5")
    return run_stage(trained, "stage=sft", *GAME, *words)


def success(run_stage: RunStage, folder: Path, guesser: Path, algo: str, *words: str) -> tuple[float, float]:
    """Held-out success before and after a run of reinforcement learning, sampled."""
    settings = (*(WITH_CRITIC if algo in CRITICS else WITHOUT), "stage.episodes=96", "stage.eval_episodes=100", RARELY)
    grouped = ("algo.group_size=4",) if "group_size" in (conf_dir() / f"algo/{algo}.yaml").read_text() else ()
    run_stage(folder, "stage=ppo", *GAME, f"stage.init={guesser}", f"algo={algo}", *settings, *grouped, *words)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    return metrics["eval/success_before"], metrics["eval/success"]


@pytest.mark.parametrize("algo", ["ppo", *SLOW])
def test_it_learns_echo_from_its_reward(run_stage: RunStage, guesser: Path, tmp_path: Path, algo: str):
    before, after = success(run_stage, tmp_path, guesser, algo)
    assert before < 0.45  # 100 guesses with 1/4 each: 0.25 +- 0.043, and some replies don't parse
    assert after > 0.9


@pytest.mark.parametrize("algo", ["ppo", *SLOW])
def test_nothing_is_learned_without_a_step(run_stage: RunStage, guesser: Path, tmp_path: Path, algo: str):
    """The control: the same with a learning rate that moves nothing."""
    still = ("stage.iterations=1", "algo.lr=0", "algo.value_lr=0")
    before, after = success(run_stage, tmp_path, guesser, algo, *still)
    assert after == before < 0.45
