"""When there is nothing to learn from, and that it is said once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_agents.config import RunConfig
from vlm_agents.learn.signal import METRIC, figures
from vlm_agents.pictures import Picture
from vlm_agents.stages import collect
from vlm_agents.stages.watch import NOTHING, Watch, conclude
from vlm_agents.types import Observation, Parsed, Reply, Step, Trajectory, Turn

SEEN = Observation("", (Picture(Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8))),))


def episode(rewards: Sequence[float], legal: Sequence[bool] | None = None, success: bool = False) -> Trajectory:
    turns = [
        Turn(
            observation=SEEN,
            prompt=(),
            reply=Reply("north\nwest" if good else "xyz"),
            parsed=Parsed(action="north") if good else Parsed(action=None, error="no action"),
            step=Step(SEEN, reward, at == len(rewards) - 1, False, success, good, True),
        )
        for at, (reward, good) in enumerate(zip(rewards, legal or [True] * len(rewards), strict=True))
    ]
    return Trajectory(env="echo", seed=0, policy="model", turns=tuple(turns), stop="success" if success else "failure")


@pytest.mark.parametrize(
    ("episodes", "lacks"),
    [
        ([episode([0, 0]), episode([0, 0, 0])], True),  # longer, and no reward tells of it
        ([episode([-0.1, -0.1], [False] * 2), episode([-0.1], [False])], True),  # nothing but illegal replies
        ([episode([0, 0.3]), episode([0, 0.1])], False),  # none succeeds, and rewards say which was nearer
        ([episode([0, 1], success=True), episode([0, 0])], False),
        ([episode([0, 1], success=True), episode([0, 1], success=True)], True),
        ([episode([0, 1], success=True), episode([0, 0, 1], success=True)], False),  # gamma: the first was faster
        ([episode([-0.1, 0], [False, True]), episode([0, -0.1], [True, False])], False),  # which turn was punished
        ([episode([0, 0])], False),  # a critic compares it with those of other iterations
    ],
)
def test_what_makes_no_difference_is_nothing_to_learn_from(episodes: list[Trajectory], lacks: bool):
    assert figures(episodes, gamma=0.9) == {METRIC: float(lacks)}


def test_with_gamma_one_being_faster_earns_no_more_in_all_but_earlier():
    assert figures([episode([0, 1], success=True), episode([0, 0, 1], success=True)], gamma=1.0) == {METRIC: 0.0}


def test_it_is_said_once_after_two_iterations_with_what_to_do(
    compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
):
    watch = Watch(compose_run("stage=ppo"))
    bad = [episode([-0.1, -0.1], [False] * 2)]
    said = []
    for lacks in (1.0, 0.0, 1.0, 1.0, 1.0, 1.0):
        watch.look({NOTHING: lacks}, bad, only=False)
        said.append(capsys.readouterr().err)
    assert [bool(text) for text in said] == [False, False, False, True, False, False]
    assert said[3].startswith("nothing to learn from: every reply is illegal, such as 'xyz' (no action).")
    assert "stage=sft first" in said[3]
    resumed = Watch(watch.cfg, watch.lacked, watch.told)  # as a checkpoint has it
    resumed.look({NOTHING: 1.0}, bad, only=True)
    assert capsys.readouterr().err == ""
    conclude(watch.cfg, {NOTHING: 1.0})
    assert "nothing to learn from" in capsys.readouterr().err
    conclude(watch.cfg, {NOTHING: 0.0, "eval/invalid_rate": 0.8})
    assert "no agent yet: 80% of its replies hold no legal action. What helps: train with" in capsys.readouterr().err
    conclude(watch.cfg, {NOTHING: 0.0})
    assert capsys.readouterr().err == ""


def test_the_remedy_is_that_of_the_lack(compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]):
    cfg = compose_run("stage=ppo")
    for episodes, penalty, words in (
        ([episode([0, 0], [False, True]), episode([0, 0])], 0.0, "env.invalid_penalty=0.1"),
        ([episode([0, 0]), episode([0, 0])], 0.1, "a temperature higher than"),
        ([episode([1], success=True), episode([1], success=True)], 0.1, "a harder env"),
    ):
        watch = Watch(replace(cfg, env=replace(cfg.env, invalid_penalty=penalty)))
        watch.look({NOTHING: figures(episodes, gamma=0.9)[METRIC]}, episodes, only=True)
        assert words in capsys.readouterr().err


def test_it_is_said_by_what_an_algorithm_compares(
    compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
):
    """Two starts that differ, and plays of each that don't: filtered, or kept; more are played than stage.episodes."""
    cfg = compose_run("stage=ppo", "algo=dapo", "algo.oversample=2", "stage.episodes=8")
    played = [episode([0.0])] * 8 + [episode([1.0], success=True)] * 8
    for metrics, words in (
        ({"ppo/kept": 0.0, "ppo/varied_groups": 0.0}, "algo.filters keep none of an iteration's 16 episodes; 8 succ"),
        ({"ppo/varied_groups": 0.0}, "none of an iteration's 16 episodes differs from another of its start in its rew"),
    ):
        Watch(cfg).look({NOTHING: 1.0, **metrics}, played, only=True)
        said = capsys.readouterr().err
        assert words in said
        assert "more episodes than stage.episodes=8, more plays of a start than algo.group_size=8; a temp" in said


def test_settings_that_say_what_success_is_may_be_why_there_is_none(
    compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """A game whose rewards are never above 0; not where some episode succeeds. What PPO, a panel and collect say."""
    env = ("env=gymnasium", "env.id=x", "env.actions=[a]", "env.instructions=x")
    panel = {"eval/success": 0.0, "eval/success_random": 0.0, "eval/return": -1.0, "eval/return_random": -1.0}
    played = {"collect/success": 0.0, "collect/invalid_rate": 0.0, "collect/return": 0.0, "collect/episode_length": 1.0}
    for words, rule in (
        ((), "a last reward above 0"),
        (("env.success=won",), "an info with won true"),
        (("env.success_return=-9",), "a return of -9 or more"),
    ):
        cfg = compose_run("stage=ppo", *env, *words)
        tell = f"another env.success or env.success_return, for success is now a game that terminates with {rule}"
        Watch(cfg).look({NOTHING: 1.0}, [episode([-1]), episode([-1])], only=True)
        assert tell in capsys.readouterr().err
        conclude(cfg, panel)
        assert tell in capsys.readouterr().err
        collect.tell(cfg, played, 4, tmp_path)
        assert f"an easier env, or {tell}" in capsys.readouterr().err
        Watch(cfg).look({NOTHING: 1.0}, [episode([1], success=True), episode([-1])], only=True)
        assert "env.success" not in capsys.readouterr().err


def test_weights_that_were_cloned_need_more_of_that(
    compose_run: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Not stage=sft first: they had it."""
    (tmp_path / "sft/model").mkdir(parents=True)
    (tmp_path / "sft/config.yaml").write_text("stage: {name: sft}")
    cfg = compose_run("stage=ppo", f"stage.init={tmp_path / 'sft/model'}")
    for episodes in ([episode([-0.1], [False])], [episode([0, 0]), episode([0, 0])]):
        Watch(cfg).look({NOTHING: 1.0}, episodes, only=True)
        said = capsys.readouterr().err
        assert "more demonstrations (stage=collect stage.episodes=) and more steps (stage.epochs=) than " in said
        assert "sft first" not in said
