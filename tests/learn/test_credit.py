from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_agents.errors import TrainingError
from vlm_agents.learn.credit import (
    AnchorState,
    BilevelGae,
    Credit,
    Gae,
    OfGroup,
    Reads,
    Returns,
    Rule,
    TokenGae,
    WithUtility,
    check,
    explained_variance,
    figures,
    gae,
    leave_one_out,
    normalise,
    normalised,
    relative,
    sampled_values,
)
from vlm_agents.types import Observation, Parsed, Reply, Step, Trajectory, Turn

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


@pytest.mark.parametrize(
    ("earned", "told"),
    [
        (None, "gives NoneType: give a list of one Credit an episode"),
        ([[0.5]], "gives list: give a list of one Credit"),
        ([Credit(np.array([np.nan]))], "advantages for words/seed 3 aren't all finite numbers"),
        ([Credit(np.zeros(1), np.array([np.inf]))], "returns for words/seed 3 aren't all finite"),
    ],
)
def test_what_somebody_s_own_rule_gives_is_looked_at(
    make_turn: MakeTurn, make_episode: MakeEpisode, earned: Any, told: str
):
    with pytest.raises(TrainingError, match=told):
        check(earned, [make_episode(make_turn([2], [9]), seed=3)], "nothing")


def test_figures_of_the_rollout():
    values, returns = np.array([0.0, 0.0, 1.0, 5.0]), np.array([0.0, 2.0, 1.0, 5.0])
    advantages = np.array([1.0, 3.0, 0.0, 0.0])  # not the returns less the values, as by a lambda below 1
    credit = [Credit(advantages[part], returns[part], values[part]) for part in (slice(2), slice(2, 4))]
    # what the critic missed, 0, 2, 0, 0, has variance 0.75, and returns 3.5; advantages (1 + 9) / 4 - 1
    assert figures(credit) == {
        "explained_variance": pytest.approx(1 - 0.75 / 3.5),
        "advantage_std": pytest.approx(1.5**0.5),
        "zero_advantage": 0.5,
    }


# ---- rules by hand ---------------------------------------------------------------------------------------------------
def played(
    rewards: Sequence[float],
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    places: Sequence[str] | None = None,
    bootstrap: float = 0.0,
    ratings: Sequence[float] | None = None,
) -> Trajectory:
    """An episode of replies of these lengths, said in these places."""
    turns = []
    for index, reward in enumerate(rewards):
        ids = (9,) * (lengths[index] if lengths else 1)
        reply = Reply("x" * len(ids), (2,), ids, (-1.0,) * len(ids), 0.0)
        seen = Observation("now", state_key=places[index] if places else f"{seed} {index}")
        step = Step(Observation("next", state_key="next"), reward, False, False, False, True, True)
        turns.append(Turn(seen, (), reply, Parsed("x"), step, rating=ratings[index] if ratings else None))
    return Trajectory("words", seed, "model", tuple(turns), "time_limit" if bootstrap else "success", bootstrap)


def advantages_of(
    rule: Rule, episodes: Sequence[Trajectory], values: Sequence[Sequence[float]] = ()
) -> list[list[float]]:
    found = rule(episodes, [np.array(some, dtype=np.float64) for some in values], 0.0)
    assert {one.advantages.dtype for one in found} == {np.dtype(np.float32)}
    return [one.advantages.tolist() for one in found]


def test_gae_over_tokens_pays_a_turn_with_its_last_token():
    episode = played([1.0, 2.0], lengths=[2, 1], bootstrap=0.5)
    (found,) = TokenGae(0.25, 0.5, 0.5)([episode], [np.array([1.0, 2.0, 4.0])], 0.0)
    # surprises 0 + 0.5*2 - 1 = 0, 1 + 0.25*4 - 2 = 0, 2 + 0.25*0.5 - 4 = -1.875, each plus a half times the next
    # advantage times the discount in between: 0.5, and 0.25 from one turn to the next
    np.testing.assert_allclose(found.advantages, [-0.05859375, -0.234375, -1.875])
    assert found.returns is not None
    np.testing.assert_allclose(found.returns, [0.94140625, 1.765625, 2.125])


def test_gae_over_turns_then_over_the_tokens_of_each():
    episodes = [played([1.0, 2.0], lengths=[2, 1], bootstrap=0.5), played([3.0], seed=1, lengths=[3])]
    values = [np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 2.0])]
    found = BilevelGae(0.5, 0.5, token_gamma=0.9, token_lam=0.5)(episodes, values, 0.0)
    # turns, by the values 1 and 4 before them: surprises 1 + 0.5*4 - 1 = 2 and 2 + 0.5*0.5 - 4 = -1.75, advantages
    # 2 - 0.25*1.75 = 1.5625 and -1.75, returns 2.5625 and 2.25, paid with the last token of each
    # tokens of turn 0: 2.5625 - 2 = 0.5625, and 0.9*2 - 1 + 0.45*0.5625 = 1.053125; of turn 1: 2.25 - 4
    np.testing.assert_allclose(found[0].advantages, [1.053125, 0.5625, -1.75])
    # the return is 3: 3 - 2 = 1, 0.9*2 - 0 + 0.45*1 = 2.25, 0.9*0 - 1 + 0.45*2.25 = 0.0125
    np.testing.assert_allclose(found[1].advantages, [0.0125, 2.25, 1.0], rtol=1e-6)
    for one, its in zip(found, values, strict=True):
        assert one.returns is not None
        np.testing.assert_allclose(one.returns, one.advantages + its)


def test_returns_are_what_came_and_guess_nothing():
    # 1 + 0.5*3.5, 2 + 0.5*3, 3, though the episode was cut off where a critic expected 8
    assert advantages_of(Returns(0.5), [played([1.0, 2.0, 3.0], bootstrap=8.0)]) == [[2.75, 3.5, 3.0]]


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        (leave_one_out, [0.0, 3.0, -3.0]),  # 2 - (4 + 0)/2, 4 - (2 + 0)/2, 0 - (2 + 4)/2
        (partial(relative, std=False), [0.0, 2.0, -2.0]),
        (partial(relative, std=True), [0.0, 1.2247449, -1.2247449]),  # over sqrt(8/3)
    ],
    ids=["rloo", "dr_grpo", "grpo"],
)
def test_a_group_is_compared_wherever_its_members_stand(
    compare: Callable[[np.ndarray], np.ndarray], expected: list[float]
):
    # returns 1 + 0.5*2 = 2, 4, 0 of start 0; start 1 has one member, start 2 two that came to 0.5*6 = 3
    episodes = [
        played([1.0, 2.0]),
        played([3.0], 1),
        played([4.0]),
        played([0, 6], 2),
        played([0.0] * 3),
        played([3], 2),
    ]
    found = advantages_of(OfGroup(0.5, compare), episodes)
    first = [expected[0]] * 2, [expected[1]], [expected[2]] * 3
    for place, by_hand in zip((0, 2, 4), first, strict=True):
        assert found[place] == pytest.approx(by_hand)
    assert [found[place] for place in (1, 3, 5)] == [[0.0], [0.0, 0.0], [0.0]]


@pytest.mark.parametrize(
    ("std", "coef", "expected"),
    [
        # whole returns 2 and 1: +-0.5; from place a 0 + 0.5*2 = 1, 1 and 0, of mean 2/3; place b was met once
        (False, 1.0, [[0.5 + 1 / 3, 0.5], [-0.5 + 1 / 3, -0.5 - 2 / 3], [0.0]]),
        (False, 2.0, [[0.5 + 2 / 3, 0.5], [-0.5 + 2 / 3, -0.5 - 4 / 3], [0.0]]),
        (False, 0.0, [[0.5, 0.5], [-0.5, -0.5], [0.0]]),
        # over 0.5, and over sqrt(2)/3
        (True, 1.0, [[1 + 0.5**0.5, 1.0], [-1 + 0.5**0.5, -1 - 2**0.5], [0.0]]),
    ],
)
def test_steps_are_compared_with_others_from_the_same_state(std: bool, coef: float, expected: list[list[float]]):
    # start 1 is in a place of the same name: it is of another group
    episodes = [played([0.0, 2.0], places="ab"), played([1.0, 0.0], places="aa"), played([5.0], 1, places="a")]
    found = advantages_of(AnchorState(0.5, std, coef), episodes)
    for one, by_hand in zip(found, expected, strict=True):
        assert one == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize(
    ("earned", "reads", "told"),
    [
        ([], "nothing", "gives 0 credits for 1 episodes"),
        ([Credit(np.zeros(3))], "nothing", "gives 3 advantages for words/seed 0, of 2 turns and 5 reply tokens"),
        ([Credit(np.zeros(2), np.zeros(1), np.zeros(2))], "turns", "gives 1 returns for words/seed 0"),
        ([Credit(np.zeros(5))], "tokens", "reads a critic's values, by tokens, and gives no returns"),
    ],
)
def test_credit_that_is_not_of_the_episodes_is_refused(earned: list[Credit], reads: Reads, told: str):
    episodes = [played([0.0, 1.0], lengths=[2, 3])]
    with pytest.raises(TrainingError, match=told):
        check(earned, episodes, reads)
    check([Credit(np.zeros(5), np.zeros(2))], episodes, "turns")
    check([Credit(np.zeros(2))], episodes, "nothing")


def test_states_without_a_name_cannot_be_compared():
    with pytest.raises(TrainingError, match=r"words names no states .*choose another algo="):
        AnchorState(0.5, False, 1.0)([played([1.0], places=[""])], [], 0.0)


@pytest.mark.parametrize(
    ("done", "expected"), [(0.0, [3.0, 2.0]), (0.25, [1.5, 0.5]), (0.5, [0.0, -1.0]), (0.9, [0.0, -1.0])]
)
def test_utility_gives_way_to_the_other_rule(done: float, expected: list[float]):
    episode = played([1.0, 2.0], bootstrap=4.0, ratings=[10, 5])
    # returns 2 + 0.5*4 = 4 and 1 + 0.5*4 = 3, of which 1 and 0.5 are useful; minus the values 3 and 5 by the rule
    (found,) = WithUtility(Gae(0.5, 1.0), 0.5, 0.5)([episode], [np.array([3.0, 5.0])], done)
    np.testing.assert_allclose(found.advantages, expected)
    assert found.returns is not None
    np.testing.assert_allclose(found.returns, [3.0, 4.0])  # the critic learns what it would have


def test_utility_guesses_nothing_where_no_critic_is_asked():
    """By the advantage of a rule without one, 1 + 0.5*2 and 2, at first nothing; the bootstrap of 4 is nobody's."""
    episode = played([1.0, 2.0], bootstrap=4.0, ratings=[10, 5])
    for done, expected in ((0.0, [2.0, 1.0]), (0.5, [2.0, 2.0])):
        (found,) = WithUtility(Returns(0.5), 0.5, 0.5)([episode], [], done)
        np.testing.assert_allclose(found.advantages, expected)


def test_utility_is_of_a_turn_where_the_rule_is_of_tokens():
    episode = played([1.0, 2.0], lengths=[2, 1], bootstrap=4.0, ratings=[10, 5])
    (found,) = WithUtility(TokenGae(1.0, 1.0, 1.0), 0.5, 0.5)([episode], [np.zeros(3)], 0.25)
    # half of 3, 3, 2, and half of 7, 7, 6
    np.testing.assert_allclose(found.advantages, [5.0, 5.0, 4.0])


# ---- what holds whatever was played ----------------------------------------------------------------------------------
# eighths: sums and differences of them are exact
numbers = st.integers(-80, 80).map(lambda eighths: eighths / 8)
groups = st.lists(numbers, min_size=2, max_size=8)
shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])
COMPARISONS = [leave_one_out, partial(relative, std=False), partial(relative, std=True)]


@pytest.mark.parametrize("compare", COMPARISONS, ids=["rloo", "dr_grpo", "grpo"])
@given(scores=groups, shift=numbers, data=st.data())
def test_a_comparison_is_centred_and_blind_to_order_and_level(compare, scores: list[float], shift: float, data):
    found = compare(scores)
    assert found.sum() == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(compare([score + shift for score in scores]), found, rtol=0, atol=1e-9)
    order = data.draw(st.permutations(range(len(scores))))
    np.testing.assert_allclose(compare([scores[place] for place in order]), found[order], rtol=0, atol=1e-9)
    assert compare([shift] * len(scores)).tolist() == [0.0] * len(scores)


@given(scores=groups)
def test_rloo_is_the_centred_score_a_little_larger(scores: list[float]):
    n = len(scores)
    centred = [score - sum(scores) / n for score in scores]
    np.testing.assert_allclose(leave_one_out(scores), [n / (n - 1) * one for one in centred], rtol=0, atol=1e-9)


@given(scores=st.lists(st.lists(numbers, min_size=1, max_size=3), min_size=2, max_size=6))
def test_gigpo_without_a_state_met_twice_is_the_group_alone(scores: list[list[float]]):
    episodes = [played(rewards, places=[f"{at} {t}" for t in range(len(rewards))]) for at, rewards in enumerate(scores)]
    alone = OfGroup(1.0, partial(relative, std=False))
    assert advantages_of(AnchorState(0.9, False, 1.0), episodes) == advantages_of(alone, episodes)


episode_parts = st.lists(st.tuples(numbers, st.lists(numbers, min_size=1, max_size=4)), min_size=1, max_size=5)


def slow_gae(
    rewards: Sequence[float], values: Sequence[float], bootstrap: float, gamma: float, lam: float
) -> list[float]:
    """The definition: the average by (1 - lam) lam^(n-1) of all n-step returns, minus the value."""
    found, after = [], [*values, bootstrap]
    for t in range(len(rewards)):
        left, average = len(rewards) - t, 0.0
        for n in range(1, left + 1):
            its = sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * after[t + n]
            average += its * (lam ** (n - 1) if n == left else (1 - lam) * lam ** (n - 1))
        found.append(average - values[t])
    return found


@given(parts=episode_parts, bootstrap=numbers, gamma=shares, lam=shares)
def test_gae_is_an_average_of_n_step_returns(parts, bootstrap: float, gamma: float, lam: float):
    rewards, firsts = [reward for reward, _ in parts], [values[0] for _, values in parts]
    episode = played(rewards, lengths=[len(values) for _, values in parts], bootstrap=bootstrap)
    (found,) = advantages_of(Gae(gamma, lam), [episode], [firsts])
    np.testing.assert_allclose(found, slow_gae(rewards, firsts, bootstrap, gamma, lam), rtol=1e-5, atol=1e-5)
    every = [value for _, values in parts for value in values]
    paid = [reward * (place == len(values) - 1) for reward, values in parts for place in range(len(values))]
    (found,) = advantages_of(TokenGae(gamma, gamma, lam), [episode], [every])
    np.testing.assert_allclose(found, slow_gae(paid, every, bootstrap, gamma, lam), rtol=1e-5, atol=1e-5)


@given(parts=episode_parts, bootstrap=numbers, gamma=shares)
def test_gae_with_lambda_one_is_what_came_minus_what_was_expected(parts, bootstrap: float, gamma: float):
    rewards, values = [reward for reward, _ in parts], [values[0] for _, values in parts]
    (found,) = advantages_of(Gae(gamma, 1.0), [played(rewards, bootstrap=bootstrap)], [values])
    came = [sum(gamma**k * reward for k, reward in enumerate([*rewards[t:], bootstrap])) for t in range(len(rewards))]
    np.testing.assert_allclose(found, np.subtract(came, values), rtol=1e-5, atol=1e-5)


@given(parts=episode_parts, bootstrap=numbers, gamma=shares, lam=shares, of_token=st.tuples(shares, shares))
def test_two_levels_are_the_upper_one_where_a_turn_is_a_token(
    parts, bootstrap: float, gamma: float, lam: float, of_token
):
    rewards, values = [reward for reward, _ in parts], [values[0] for _, values in parts]
    episode = played(rewards, bootstrap=bootstrap)
    by_turn = advantages_of(Gae(gamma, lam), [episode], [values])
    assert advantages_of(TokenGae(gamma, of_token[0], lam), [episode], [values]) == by_turn
    assert advantages_of(BilevelGae(gamma, lam, *of_token), [episode], [values])[0] == pytest.approx(
        by_turn[0], abs=1e-5
    )
