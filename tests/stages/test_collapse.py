"""When a training is said to fall apart, by what, and which checkpoint is left of one that is stopped for it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from vlm_agents import checkpoints
from vlm_agents.checkpoints import Checkpoint, latest
from vlm_agents.errors import TrainingError
from vlm_agents.stages.collapse import Collapse

RunStage = Callable[..., Path]
FINE = {"rollout/success": 0.5, "rollout/invalid_rate": 0.1}


def none(before: int | None = None) -> Checkpoint | None:
    return None


def look(collapse: Collapse, *iterations: Mapping[str, float]) -> None:
    for iteration, metrics in enumerate(iterations):
        collapse.look(iteration, {**FINE, **metrics}, none)


@pytest.mark.parametrize(
    ("iterations", "told"),
    [
        # a rate passes a half, and what it was at first by 0.3, twice in a row
        ([{}, {"rollout/invalid_rate": 0.6}, {"rollout/invalid_rate": 0.6}], "rollout/invalid_rate 0.100 -> 0.600"),
        ([{}, {"rollout/truncated_rate": 0.9}, {"rollout/truncated_rate": 0.8}], "rollout/truncated_rate 0.000 -> 0.8"),
        ([{}, *[{"rollout/repeated_token_rate": 0.7}] * 2], "rollout/repeated_token_rate 0.000 -> 0.700"),
        ([{}, {"rollout/invalid_rate": 0.6}, {}, {"rollout/invalid_rate": 0.6}], ""),
        ([{}, *[{"rollout/invalid_rate": 0.5}] * 3], ""),
        ([*[{"rollout/invalid_rate": 0.9}] * 4], ""),  # it never was better
        ([{"rollout/invalid_rate": 0.4}, *[{"rollout/invalid_rate": 0.65}] * 2], ""),
        # the best mean over four iterations is 0.5, the last two have a mean below half of it, then still
        ([*[{}] * 4, *[{"rollout/success": 0.2}] * 3], "rollout/success 0.500 -> 0.200 in iteration 7"),
        ([*[{}] * 4, *[{"rollout/success": 0.26}] * 3], ""),
        ([*[{"rollout/success": 0.29}] * 4, *[{"rollout/success": 0.0}] * 3], ""),  # nothing much to lose
        ([*[{}] * 3, *[{"rollout/success": 0.0}] * 2], ""),  # too soon to say what was best
    ],
)
def test_what_falls_apart_is_told_once_with_what_helps(
    iterations: list[Mapping[str, float]], told: str, capsys: pytest.CaptureFixture[str]
):
    collapse = Collapse(stop=False)
    look(collapse, *iterations)
    said = capsys.readouterr().err
    assert bool(said) == bool(told)
    assert told in said
    if told:
        assert "What helps: " in said
        assert said.endswith("Training goes on; stage.stop_on_collapse=true would end it\n")
        look(collapse, *[{"rollout/invalid_rate": 1.0}] * 3)
        assert not capsys.readouterr().err
    assert not collapse.suspected  # which is said of a run that is to stop


def test_what_was_seen_goes_on_with_the_run():
    bad = {"rollout/invalid_rate": 0.6}
    collapse = Collapse(stop=True)
    look(collapse, {}, bad)
    assert collapse.suspected
    with pytest.raises(TrainingError, match=r"invalid_rate 0\.100 -> 0\.600 in iteration 1\. Begin anew .*invalid_pen"):
        look(Collapse(True, collapse.state), bad)
    look(collapse, {})
    assert not collapse.suspected


def test_a_run_that_stops_keeps_the_weights_from_before(run_stage: RunStage, tmp_path: Path):
    """A learning rate of 1 leaves nothing of the shipped weights in the first update; the second and third iteration
    show it. A checkpoint was due after the second, and would have taken the place of the only good one."""
    words = ("stage=ppo", "env=number_line", "prompt=cot_json", "prompt.max_reply_tokens=64", "model.path=null")
    words += ("stage.episodes=4", "stage.eval_episodes=1", "stage.iterations=9", "env.max_steps=2", "algo=reinforce")
    words += ("algo.lr=1", "stage.stop_on_collapse=true", "stage.checkpoint_every=2", "stage.keep_checkpoints=2")
    with pytest.raises(TrainingError, match=r"in iteration 3\. .*stage\.init=.*step_000000 has the last good weights"):
        run_stage(tmp_path, *words)
    left = latest(tmp_path / "checkpoints")
    assert left is not None
    assert left.step == 0
    assert not (tmp_path / "DONE").exists()


NOTHING: dict = {"state": {}, "seconds": 0.0, "offsets": {}, "last_lines": {}}


def train(folder: Path, invalid: list[float], every: int = 1) -> list[int]:
    """Looks at iterations of these rates, and saves as stage=ppo does. The steps of the checkpoints that are kept."""
    collapse = Collapse(stop=True)
    for iteration, rate in enumerate(invalid):
        metrics = {"rollout/success": 0.0, "rollout/invalid_rate": rate}
        collapse.look(iteration, metrics, partial(checkpoints.latest, folder))
        if (iteration + 1) % every == 0 and not collapse.suspected:
            checkpoints.save(folder, iteration + 1, lambda path: None, NOTHING, keep=2)
    return [checkpoints.step_of(path) for path in checkpoints.newest_first(folder)]


@pytest.mark.parametrize(("every", "good"), [(1, "step_000003"), (2, "step_000002")])
def test_good_weights_are_from_before_those_that_played_the_first_bad_iteration(tmp_path: Path, every: int, good: str):
    """The fifth iteration is bad: the weights that the fourth left played it."""
    with pytest.raises(TrainingError, match=rf"0.000 -> 1.000 in iteration 6. .*stage.init=.*{good} has the last good"):
        train(tmp_path, [0, 0, 0, 0.2, 1, 1], every)


def test_where_no_good_weights_are_left_that_is_told(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"no checkpoint is left from before: have a smaller"):
        train(tmp_path, [0, 0, 0, 0, 1, 1], every=4)


def test_one_bad_iteration_is_no_collapse_and_leaves_no_checkpoint(tmp_path: Path):
    assert train(tmp_path, [0, 0, 1, 0.2]) == [4, 2]
