"""A training that falls apart: when it is told, when it stops, and which weights are called good."""

from functools import partial
from pathlib import Path

import pytest

from vlm_agents import checkpoints
from vlm_agents.errors import TrainingError
from vlm_agents.stages.collapse import Collapse

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
