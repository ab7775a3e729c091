"""Estimators against closed forms and numbers worked out by hand; intervals against how often they hold the truth."""

import numpy as np
import pytest

from vlm_agents.intervals import (
    bands,
    difference,
    false_discoveries,
    improvement,
    iqm,
    of_these_runs,
    percentiles,
    ranks,
    resampled_panels,
    resampled_scores,
)
from vlm_agents.metrics import wilson_interval


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ([0.3], 0.3),
        ([0.0, 0.3, 0.9], 0.4),  # fewer than 4: none is left out
        ([9.0, 0.2, 0.4, -5.0], 0.3),  # one at each end
        ([9.0, 0.2, 0.4, 0.6, -5.0], 0.4),
        ([0, 1, 2, 3, 4, 5, 6, 70], 3.5),  # two at each end: (2 + 3 + 4 + 5) / 4
    ],
)
def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end(scores: list[float], mean: float):
    assert iqm(np.array(scores)) == pytest.approx(mean)
    assert iqm(np.array([scores, scores[::-1]])) == pytest.approx([mean, mean])


def test_the_probability_of_improvement_counts_pairs_and_half_of_ties():
    # 0.5 against 0.4 and 0.5: one win, one tie; 0.7: two wins; 0.3: two losses. (1 + 0.5 + 2) / 6
    first, second = np.array([0.4, 0.5]), np.array([0.5, 0.7, 0.3])
    assert improvement(first, second) == pytest.approx(3.5 / 6)
    assert improvement(second, first) == pytest.approx(2.5 / 6)
    assert improvement(np.array([first, first]), np.array([second, second])) == pytest.approx([3.5 / 6] * 2)


def test_a_panel_is_drawn_with_replacement_and_once_for_all_runs():
    rng = np.random.default_rng(0)
    panels = resampled_panels(4, rng, replicates=500)
    assert panels.shape == (500, 4)
    assert panels.sum(axis=1) == pytest.approx(np.ones(500))
    outcomes = np.array([[1.0, 0, 0, 1], [1, 0, 0, 1]])  # runs that do alike still do so on any panel
    scores = resampled_scores(outcomes, panels, rng)
    assert scores[:, 0] == pytest.approx(scores[:, 1])
    assert set(scores.ravel().tolist()) <= {0, 0.25, 0.5, 0.75, 1}
    # the mean of 4 draws of a coin: standard error sqrt(0.25 / 4)
    assert scores[:, 0].std() == pytest.approx(0.25, abs=0.02)


def test_runs_are_drawn_with_replacement():
    rng = np.random.default_rng(0)
    outcomes = np.array([[0.0] * 5, [1.0] * 5])  # on any panel the scores are 0 and 1
    scores = resampled_scores(outcomes, resampled_panels(5, rng, replicates=2000), rng)
    # both the first, one of each, both the second
    assert np.bincount((2 * scores.mean(axis=1)).round().astype(int)) / 2000 == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.04
    )


def test_an_interval_is_the_middle_of_the_replicates():
    assert percentiles(0.5, np.arange(1001) / 1000) == pytest.approx((0.5, 0.025, 0.975))


def test_these_runs_have_wilsons_interval_of_as_many_episodes_as_are_independent():
    one = np.array([[1.0, 1, 1, 0]])
    assert of_these_runs(one) == pytest.approx((0.75, *wilson_interval(3, 4)))
    alike = np.array([[1.0, 1, 1, 0]] * 3)  # three runs that do alike tell no more than one
    assert of_these_runs(alike) == pytest.approx((0.75, *wilson_interval(3, 4)))
    # shares 1/3, 1/3, 1/3, 2/3 spread less than chance would have them: all twelve count, and no more
    mixed = np.array([[1.0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert of_these_runs(mixed) == pytest.approx((5 / 12, *wilson_interval(5, 12)))


def test_single_runs_differ_as_their_held_out_seeds_do():
    first, second = np.array([[0.0, 0, 1, 1]]), np.array([[1.0, 0, 1, 1]])
    # gains 1, 0, 0, 0: mean 0.25, standard error sqrt(0.25 / 4), t of 3 degrees of freedom 3.1824; no more than 1
    found = difference(first, second)
    assert found[:3] == pytest.approx((0.25, 0.25 - 3.1824 * 0.25, 1.0), abs=1e-4)
    assert found.p == pytest.approx(0.3910, abs=1e-4)  # of t = 1


def test_where_only_runs_vary_a_difference_is_welchs():
    """Every run scores the same on each seed, so that seeds tell nothing: Welch's t-test of the scores remains."""
    from scipy import stats

    scores = [0.2, 0.4, 0.6], [0.5, 0.8, 0.7, 0.8]
    first, second = (np.repeat(np.array(own)[:, None], 50, axis=1) for own in scores)
    found, welch = difference(first, second), stats.ttest_ind(scores[1], scores[0], equal_var=False)
    interval = welch.confidence_interval()
    assert found == pytest.approx((0.3, interval.low, interval.high, tuple(welch)[1]))


def test_noise_of_single_episodes_is_counted_once():
    """Independent episodes: the variance of a mean over 3 runs and 200 seeds is p (1 - p) / 600, whatever it is split
    into."""
    rng = np.random.default_rng(0)
    widths = []
    for _ in range(60):
        first, second = (rng.random((8, 200)) < 0.5).astype(float), (rng.random((8, 200)) < 0.5).astype(float)
        found = difference(first, second)
        widths.append((found.high - found.low) / 2)
    assert np.mean(widths) == pytest.approx(2.0 * (2 * 0.25 / 1600) ** 0.5, rel=0.2)  # twice would be 1.41 times that


def test_what_does_not_vary_at_all_is_sure():
    ones, zeros = np.ones((3, 5)), np.zeros((3, 5))
    assert difference(ones, ones) == (0, 0, 0, 1)
    assert difference(zeros, ones) == (1, 1, 1, 0)
    assert difference(ones[:, :1], ones[:, :1]).p == 1


def test_many_comparisons_are_adjusted_for():
    # sorted, times 4 / rank: 0.04, 0.04, 0.0533, 0.5; the first is no larger than the second
    assert false_discoveries([0.04, 0.01, 0.5, 0.02]) == pytest.approx([0.04 * 4 / 3, 0.04, 0.5, 0.04])
    assert false_discoveries([]) == []


def test_equal_scores_share_their_rank():
    assert ranks(np.array([[0.2, 0.9, 0.9], [0.3, 0.2, 0.1]])).tolist() == [[3, 1.5, 1.5], [1, 2, 3]]


def test_the_band_of_two_runs_reaches_from_the_one_to_the_other():
    low, high = bands(np.array([[0.0, 0.5, 0.3], [1.0, 0.5, 0.4]]), np.random.default_rng(0))
    assert low == pytest.approx([0, 0.5, 0.3])
    assert high == pytest.approx([1, 0.5, 0.4])


@pytest.mark.parametrize(
    ("runs", "between", "bootstrap", "paired"),
    [  # of the intervals shall hold the truth; docs/compare.md has more of these
        (1, 0.0, (0.90, 0.98), (0.90, 0.99)),
        (3, 0.0, (0.95, 1.0), (0.92, 1.0)),
        (5, 0.05, (0.92, 1.0), (0.90, 0.99)),
        (1, 0.1, (0.35, 0.65), (0.35, 0.65)),  # one run says nothing of others
    ],
)
def test_intervals_hold_the_truth_as_often_as_the_docs_say(runs: int, between: float, bootstrap, paired):
    rng = np.random.default_rng(0)
    held, held_pair, times = 0, 0, 120

    def play(deal: np.ndarray) -> np.ndarray:
        chance = 0.6 + rng.normal(0, between, (runs, 1)) + deal
        return (rng.random((runs, len(deal))) < chance).astype(float)

    for _ in range(times):
        deal = rng.normal(0, 0.05, 200)
        first, second = play(deal), play(deal)
        drawn = resampled_scores(first, resampled_panels(200, rng, replicates=200), rng)
        found, pair = percentiles(float(iqm(first.mean(axis=1))), iqm(drawn)), difference(first, second)
        held += found.low <= 0.6 <= found.high
        held_pair += pair.low <= 0 <= pair.high
    assert bootstrap[0] <= held / times <= bootstrap[1]
    assert paired[0] <= held_pair / times <= paired[1]
