"""The words for every metric, docs/metrics.md, and the sentence that a run comes down to."""

from pathlib import Path

import pytest

from vlm_agents.metrics import GROUPS, Name, document, headline, parts, shortcoming, worsened


def test_the_document_is_the_current_one():
    """`python -m vlm_agents.metrics > docs/metrics.md` makes it so."""
    assert Path(__file__).parents[1].joinpath("docs/metrics.md").read_text(encoding="utf-8") == document()


def test_every_metric_is_explained_in_a_line():
    for group in GROUPS.values():
        for name, metric in group.metrics.items():
            assert metric.meaning, name
            assert len(metric.meaning) < 100, name
            assert "|" not in "".join(metric), name  # it is a cell of a table


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rollout/success", Name("rollout", "success")),
        ("eval/success", Name("eval", "success")),
        ("eval/success_low_greedy_before", Name("eval", "success_low", "greedy", True)),
        ("eval/return_random", Name("eval", "return", "random")),
        ("eval/steps_over_expert", Name("eval", "steps_over_expert")),  # which ends like a variant, and is none
        ("eval/steps_over_expert_expert", Name("eval", "steps_over_expert", "expert")),
        ("eval/random_rate_before", Name("eval", "random_rate", "", True)),
        ("eval/success/task/go-to_greedy_before", Name("eval", "success/task/go-to", "greedy", True)),
        ("eval/episodes/first/red", Name("eval", "episodes/first/red")),
    ],
)
def test_names_are_taken_apart(name: str, found: Name):
    assert parts(name) == found
    assert found.metric is not None


def test_a_name_that_nobody_knows_has_no_meaning():
    assert parts("eval/nonsense").metric is None
    assert parts("nonsense").metric is None


PANEL = {"eval/success": 1.0, "eval/success_low": 0.981, "eval/success_high": 1.0}
BEFORE = {"eval/success_before": 0.47, "eval/success_low_before": 0.402, "eval/success_high_before": 0.539}
GREEDY = {"eval/success_greedy": 0.99, "eval/success_low_greedy": 0.964, "eval/success_high_greedy": 0.997}


@pytest.mark.parametrize(
    ("stage", "metrics", "line"),
    [
        ("eval", PANEL, "success 1.000 [0.981, 1.000]"),
        ("eval", PANEL | GREEDY, "success 1.000 [0.981, 1.000] sampled, 0.990 [0.964, 0.997] greedy"),
        (
            "ppo",
            PANEL | GREEDY | BEFORE | {"eval/success_greedy_before": 0.75},
            "success 0.470 [0.402, 0.539] -> 1.000 [0.981, 1.000] sampled, 0.750 -> 0.990 [0.964, 0.997] greedy",
        ),
        ("ppo", {"rollout/success": 0.5}, "success 0.500 in the last iteration's rollout, no held-out seed played"),
        ("sft", {"sft/loss": 0.12345, "sft/rows": 40.0}, "loss 0.1235 over 40 rows, none of them held out"),
        (
            "sft",
            {"sft/loss": 0.5, "sft/rows": 40.0, "sft/val_loss": 0.75},
            "loss 0.5 over 40 rows, 0.75 on held-out rows",
        ),
        (
            "sft",
            {"sft/loss": 0.5, "sft/rows": 40.0, "sft/val_loss": 0.75, "sft/val_rows": 8.0},
            "loss 0.5 over 40 rows, 0.75 on 8 held-out rows",
        ),
        ("collect", {"collect/episodes": 40.0, "collect/success": 0.5}, "40 episodes, success 0.500"),
        (
            "collect",
            {"collect/episodes": 40.0, "collect/success": 0.5, "collect/random_rate": 0.3},
            "40 episodes, 30% of the turns at random, success 0.500",
        ),
        ("preprocess", {"preprocess/train": 9.0, "preprocess/validation": 1.0}, "9 rows to train on, 1 held out"),
        ("merge", {"merge/max_logit_difference": 1.5e-5}, "logits within 1.5e-05 of the adapter model's"),
        ("serve", {"serve/loading_s": 61.0, "serve/served_s": 600.0}, "answered for 600 s, 61 s after its start"),
        (
            "doctor",
            {"doctor/peak_bytes": 2.0**30, "doctor/machine_bytes": 2.0**31, "doctor/fits": 1.0},
            "needs 1.00 GiB of 2.00, fits",
        ),
    ],
)
def test_a_run_comes_down_to_a_line(stage: str, metrics: dict[str, float], line: str):
    assert headline(stage, metrics) == line


def test_the_sentence_says_where():
    assert headline("eval", PANEL, " on 200 held-out seeds of Echo:").startswith(
        "success on 200 held-out seeds of Echo: 1."
    )


@pytest.mark.parametrize(
    ("panels", "said"),
    [
        ({"": (0.3, 0.0), "_random": (0.4, 0.0)}, "no better than random play, with success 0.400"),
        ({"": (0.4, 0.0), "_random": (0.4, 0.0)}, "no better"),
        ({"": (0.0, 0.2), "_random": (0.0, 0.1)}, ""),  # none succeeds, and returns say which is nearer
        ({"": (0.3, 0.0), "_greedy": (0.9, 0.0), "_random": (0.4, 0.0)}, ""),  # its temperature is too high, no more
        ({"": (1.0, 1.0), "_random": (1.0, 1.0)}, ""),  # anybody solves it
        ({"": (0.3, 0.0)}, ""),  # nobody played at random
    ],
)
def test_a_policy_no_better_than_chance_is_told(panels: dict[str, tuple[float, float]], said: str):
    metrics = {f"eval/success{end}": success for end, (success, _) in panels.items()}
    found = shortcoming(metrics | {f"eval/return{end}": value for end, (_, value) in panels.items()})
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"eval/invalid_rate": 0.77}, "77% of its replies"),
        ({"eval/invalid_rate": 0.5}, ""),
        ({"eval/invalid_rate": 0.77, "eval/invalid_rate_greedy": 0.1}, ""),
        ({"rollout/invalid_rate": 0.77}, "77% of its replies"),  # no panel was played
        ({"sft/loss": 1.0}, ""),
    ],
)
def test_a_policy_that_is_mostly_illegal_is_told(rates: dict[str, float], said: str):
    assert said in shortcoming(rates)
    assert bool(said) == bool(shortcoming(rates))


def test_a_policy_that_training_made_worse_is_told_by_the_interval_before():
    panel = {"eval/success": 0.9, "eval/success_low": 0.85, "eval/success_high": 0.94, "eval/success_greedy": 0.875}
    was = {f"{name}_before": value for name, value in panel.items()}
    assert worsened(panel) == worsened(panel | was) == ""
    was |= {"eval/success_greedy_before": 0.985, "eval/success_low_greedy_before": 0.957}
    assert worsened(panel | was) == "greedy success 0.985 -> 0.875"
    assert worsened(panel | was | {"eval/success": 0.849}).startswith("success 0.900 [0.850, 0.940] -> 0.849 [")
