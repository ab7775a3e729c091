from collections.abc import Callable

import numpy as np
import pytest

from vlm_agents.errors import TrainingError
from vlm_agents.learn.credit import Credit, Gae, explained_variance, figures, gae, normalise, normalised, sampled_values
from vlm_agents.types import Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
REWARDS, VALUES = [0.0, 0.0, 1.0], [0.5, 0.6, 0.7]


def test_gae_of_a_terminated_episode():
    advantages, returns = gae(REWARDS, VALUES, bootstrap=0.0, gamma=0.9, lam=0.8)
    # A2 = 1 - 0.7 = 0.3;  A1 = (0.9*0.7 - 0.6) + 0.72*0.3 = 0.246;  A0 = (0.9*0.6 - 0.5) + 0.72*0.246 = 0.21712
    np.testing.assert_allclose(advantages, [0.21712, 0.246, 0.3], rtol=1e-6)
    np.testing.assert_allclose(returns, [0.71712, 0.846, 1.0], rtol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_gae_of_a_truncated_episode_counts_what_would_have_followed():
    advantages, returns = gae(REWARDS, VALUES, bootstrap=0.8, gamma=0.9, lam=0.8)
    # A2 = 1 + 0.9*0.8 - 0.7 = 1.02;  A1 = 0.03 + 0.72*1.02 = 0.7644;  A0 = 0.04 + 0.72*0.7644 = 0.590368
    np.testing.assert_allclose(advantages, [0.590368, 0.7644, 1.02], rtol=1e-6)
    np.testing.assert_allclose(returns, [1.090368, 1.3644, 1.72], rtol=1e-6)


def test_lambda_one_gives_discounted_returns_and_lambda_zero_one_step_targets():
    _, monte_carlo = gae([1.0, 2.0, 3.0], [9.0, 8.0, 7.0], bootstrap=4.0, gamma=0.5, lam=1.0)
    # 3 + 0.5*4 = 5;  2 + 0.5*5 = 4.5;  1 + 0.5*4.5 = 3.25
    np.testing.assert_allclose(monte_carlo, [3.25, 4.5, 5.0], rtol=1e-6)
    _, one_step = gae([1.0, 2.0, 3.0], [9.0, 8.0, 7.0], bootstrap=4.0, gamma=0.5, lam=0.0)
    # r + 0.5 * next value
    np.testing.assert_allclose(one_step, [5.0, 5.5, 5.0], rtol=1e-6)


def test_normalise():
    # mean 2, standard deviation sqrt(2/3)
    np.testing.assert_allclose(normalise(np.array([1.0, 2.0, 3.0])), [-1.2247449, 0.0, 1.2247449], rtol=1e-6)


@pytest.mark.parametrize("advantages", [[3.0], [0.1] * 7, [0.1, 0.1 + 1e-8]], ids=["one", "equal", "rounding"])
def test_normalise_makes_no_signal_of_nothing(advantages: list[float]):
    np.testing.assert_allclose(normalise(np.array(advantages)), 0.0, atol=1e-7)


def test_explained_variance():
    returns = np.array([0.0, 2.0, 4.0])
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0)  # a constant offset is not variance
    assert explained_variance(np.full(3, 7.0), returns) == pytest.approx(0.0)
    # what is left is -returns, with their own variance, then -2 * returns, with four times that
    assert explained_variance(2 * returns, returns) == pytest.approx(0.0)
    assert explained_variance(3 * returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(3)) == 0.0


def test_advantages_are_normalised_over_all_turns_and_returns_are_not(make_turn: MakeTurn, make_episode: MakeEpisode):
    ended = make_episode(make_turn([2], [9], 0.0, 0.5), make_turn([3], [9], 1.0, 0.6))
    cut = make_episode(make_turn([4], [9], 0.0, 0.7), stop="time_limit", bootstrap=0.5)
    credit = normalised(Gae(gamma=0.9, lam=0.8)([ended, cut], sampled_values([ended, cut]), 0.0))
    # A: 0.9*0.6 - 0.5 + 0.72*0.4 = 0.328;  1 - 0.6 = 0.4;  0.9*0.5 - 0.7 = -0.25
    # mean 0.159333, deviations 0.168667, 0.240667, -0.409333, standard deviation sqrt(0.2539227 / 3) = 0.290931
    np.testing.assert_allclose(credit[0].advantages, [0.579748, 0.827229], rtol=1e-5)
    np.testing.assert_allclose(credit[1].advantages, [-1.406977], rtol=1e-5)
    returns, values = ([getattr(one, name) for one in credit] for name in ("returns", "values"))
    np.testing.assert_allclose(np.concatenate(returns), [0.828, 1.0, 0.45], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(values), [0.5, 0.6, 0.7])
    assert {array.dtype for array in [credit[0].advantages, *returns, *values]} == {np.dtype(np.float32)}


def test_replies_that_no_model_of_ours_sampled_are_refused(make_turn: MakeTurn, make_episode: MakeEpisode):
    episode = make_episode(make_turn([2], [9]), make_turn([2], [9], value=None), seed=3)
    with pytest.raises(TrainingError, match=r"words/seed 3: .* no value"):
        sampled_values([episode])


def test_figures_of_the_rollout():
    values, returns = np.array([0.0, 0.0, 1.0, 5.0]), np.array([0.0, 2.0, 1.0, 5.0])
    credit = [Credit(np.full(2, 9.0), returns[part], values[part]) for part in (slice(2), slice(2, 4))]
    # raw advantages 0, 2, 0, 0 have variance 0.75; returns 0, 2, 1, 5 have variance 3.5; the normalised don't count
    assert figures(credit) == {
        "explained_variance": pytest.approx(1 - 0.75 / 3.5),
        "advantage_std": pytest.approx(0.75**0.5),
        "zero_advantage": 0.75,
    }
