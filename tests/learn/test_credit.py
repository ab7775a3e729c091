import numpy as np
import pytest
from vlm_agents.learn.advantages import explained_variance, gae, normalise

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
