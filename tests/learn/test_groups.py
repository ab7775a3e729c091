"""Which groups, and which of their members, are learned from; and what that changes in what the others are worth."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import pvariance
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn import groups
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.groups import Group, grouped
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.shaping import with_bonuses
from vlm_agents.tensors import Renderer
from vlm_agents.types import Observation, Parsed, Reply, Step, Stop, Trajectory, Turn


def member(reward: float, seed: int = 0, stop: Stop = "success", cut: bool = False, bonus: float = 0.0) -> Trajectory:
    """A play of two turns, of which the second is paid; `cut`: one of its replies was, at its limit."""
    turns = []
    for paid in (0.0, reward):
        reply = Reply("x", (2, 3), (9, 1), (-1.0, -1.0), finish="length" if cut and paid == 0 else "stop")
        seen = Observation("now", state_key="here")
        turns.append(Turn(seen, (), reply, Parsed("x"), Step(seen, paid, False, False, False, True, True)))
    error = "worker died" if stop == "env_error" else None
    whole = Trajectory("words", seed, "model", tuple(turns), stop, error=error)
    return with_bonuses(whole, "bonus", [0.0, bonus])


def group(*rewards: float, seed: int = 0) -> Group:
    return [member(reward, seed) for reward in rewards]


def rewards_of(found: Sequence[Group]) -> list[list[float]]:
    return [[one.turns[1].step.reward for one in its] for its in found]


# ---- filters ---------------------------------------------------------------------------------------------------------
def test_groups_are_in_the_order_of_their_first_members():
    episodes = [member(1.0, 7), member(2.0, 3), member(3.0, 7), member(4.0, 5), member(5.0, 3)]
    assert rewards_of(grouped(episodes)) == [[1.0, 3.0], [2.0, 5.0], [4.0]]
    assert grouped([]) == []


def test_groups_that_came_all_to_the_same_are_dropped_by_the_env_or_by_what_is_trained_on():
    alike, differing, lone = group(1.0, 1.0), group(0.0, 1.0), group(4.0)
    shaped = [member(1.0, bonus=0.0), member(1.0, bonus=0.25)]  # alike by the env alone
    levelled = [member(1.0, bonus=0.0), member(0.5, bonus=0.5)]  # by what is trained on alone
    rounding = group(0.1 + 0.2, 0.3)
    every = [alike, differing, shaped, lone, levelled, rounding]
    assert groups.differing_outcomes(every) == [differing, levelled]
    assert groups.differing_rewards(every) == [differing, shaped]
    for choose in (groups.differing_outcomes, groups.differing_rewards):
        assert choose([alike, lone]) == choose([]) == []


def test_members_that_broke_or_were_cut_off_are_dropped_and_the_others_stay():
    stops: list[Stop] = ["success", "invalid", "failure", "too_long", "time_limit"]
    mixed, broken = [member(float(at), stop=stop) for at, stop in enumerate(stops)], [member(9.0, stop="invalid")]
    assert rewards_of(groups.unbroken([mixed, broken, group(7.0)])) == [[0.0, 2.0, 4.0], [7.0]]
    partly = [member(1.0), member(2.0, cut=True), member(3.0)]
    assert rewards_of(groups.not_overlong([partly, [member(4.0, cut=True)]])) == [[1.0, 3.0]]
    assert groups.unbroken([broken]) == groups.not_overlong([]) == []


def test_largest_variances_by_hand():
    # variances 1, 4, 0, 4, 0.25 of 9.25 in all
    every = [group(0, 2), group(0, 4), group(3, 3), group(5, 1), group(0, 1)]
    expected = {0.3: [1], 0.5: [1, 3], 0.9: [0, 1, 3], 0.98: [0, 1, 3, 4], 1.0: [0, 1, 3, 4]}  # of a tie the first
    for share, places in expected.items():
        assert groups.largest_variance(share)(every) == [every[place] for place in places]
    assert groups.largest_variance(0.9)([group(3, 3), group(1)]) == groups.largest_variance(0.9)([]) == []


quarters = st.integers(-12, 12).map(lambda number: number / 4)


@given(
    rewards=st.lists(st.lists(quarters, min_size=1, max_size=4), min_size=1, max_size=6),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_no_fewer_groups_hold_as_much_of_the_variance(rewards: list[list[float]], share: float):
    every = [group(*some, seed=seed) for seed, some in enumerate(rewards)]
    variances = [pvariance(some) for some in rewards]
    kept = [one[0].seed for one in groups.largest_variance(share)(every)]
    assert kept == sorted(kept)
    wanted = share * sum(variances) - 1e-9
    assert sum(variances[place] for place in kept) >= wanted
    for fewer in combinations(range(len(every)), max(0, len(kept) - 1)):
        assert not kept or sum(variances[place] for place in fewer) < wanted


def test_the_largest_spread_comes_first_and_a_tie_as_it_was():
    every = [group(0, 1), group(2, 2), group(5, 1), group(0, 4), group(9)]
    assert groups.by_spread(every) == [every[place] for place in (2, 3, 0, 1, 4)]
    assert groups.by_spread([]) == []


# ---- as many as are wanted -------------------------------------------------------------------------------------------
@pytest.fixture
def make_learner(tiny_agent: Any, renderer: Renderer) -> Callable[..., Learner]:
    def make(*filters: str, **changes: Any) -> Learner:
        settings = {"credit": "group", "group_size": 2, "normalise": False, "max_mismatch_kl": None}
        algo = AlgoConfig(name="test", filters=list(filters), **settings | changes)
        return Learner(tiny_agent(), renderer, make_algorithm(algo, 64, tempered=False), algo, 10, Shares(1000))

    return make


EPISODES = [
    *(member(reward, 0) for reward in (0.0, 1.0)),
    member(1.0, 1),
    member(5.0, 2, stop="env_error"),
    *(member(reward, 3) for reward in (4.0, 0.0)),
    member(1.0, 1),
    *(member(reward, 4) for reward in (2.0, 0.0)),
]


@pytest.mark.parametrize(
    ("filters", "wanted", "kept"),
    [
        ([], 2, [0, 1, 2, 6, 4, 5, 7, 8]),  # without filters all that no env broke, group by group
        (["reward"], 6, [0, 1, 4, 5, 7, 8]),
        (["reward"], 4, [0, 1, 4, 5]),
        (["reward"], 3, [0, 1, 4, 5]),  # whole groups
        (["reward"], 99, [0, 1, 4, 5, 7, 8]),
        (["reward", "rank"], 4, [4, 5, 7, 8]),
        (["rank"], 8, [4, 5, 7, 8, 0, 1, 2, 6]),
        (["variance"], 8, [4, 5, 7, 8]),  # variances 0.25, 0, 4 and 1: 5 of 5.25 is more than 0.9
        (["variance", "rank"], 1, [4, 5]),
    ],
)
def test_groups_are_kept_until_there_are_as_many_as_wanted(
    make_learner: Callable[..., Learner], filters: list[str], wanted: int, kept: list[int]
):
    found = make_learner(*filters).kept(EPISODES, wanted)
    assert list(map(id, found)) == [id(EPISODES[place]) for place in kept]  # some are equal


def test_of_groups_that_are_all_alike_nothing_is_kept_and_nothing_is_moved(make_learner: Callable[..., Learner]):
    learner, episodes = make_learner("reward"), [member(1.0, seed) for seed in (0, 0, 1, 1)]
    assert learner.kept(episodes, 4) == []
    metrics = learner.learn(episodes, 4, np.random.default_rng(0))
    assert metrics["ppo/kept"] == metrics["ppo/updates"] == metrics["ppo/varied_groups"] == 0
    assert metrics["ppo/nothing_to_learn"] == 1
    assert learner.iteration == 1
    with pytest.raises(TrainingError, match="none of 1 episodes is usable"):
        learner.kept([member(1.0, stop="env_error")], 4)


def test_plays_that_differ_from_those_of_other_starts_alone_teach_a_group_nothing(make_learner: Callable[..., Learner]):
    """Without a filter, and a critic, that is told too; one play that differs within its start is something."""
    for rewards, lacks in (((0.0, 0.0, 1.0, 1.0), 1), ((0.0, 0.5, 1.0, 1.0), 0)):
        episodes = [member(reward, seed) for reward, seed in zip(rewards, (0, 0, 1, 1), strict=True)]
        assert make_learner().learn(episodes, 4, np.random.default_rng(0))["ppo/nothing_to_learn"] == lacks
    alone = [member(reward, seed) for seed, reward in enumerate((0.0, 1.0))]
    ungrouped = make_learner(credit="returns", group_size=1)
    assert ungrouped.learn(alone, 4, np.random.default_rng(0))["ppo/nothing_to_learn"] == 0


# ---- before or after members are dropped -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("over", "changes", "expected"),
    [
        # start 0 came to 0, 1 and 5, of which the last broke: a mean of 0.5 of those kept, of 2 of all
        ("kept", {}, [-0.5, 0.5, -1.0, 1.0]),
        ("played", {}, [-2.0, -1.0, -1.0, 1.0]),
        # over 0.5, or over sqrt((4 + 1 + 9) / 3) = 2.160247
        ("kept", {"group_std": True}, [-1.0, 1.0, -1.0, 1.0]),
        ("played", {"group_std": True}, [-0.9258201, -0.4629100, -1.0, 1.0]),
        # minus the mean of the others: of 1, and of 0; or of 1 and 5, and of 0 and 5
        ("kept", {"credit": "rloo"}, [-1.0, 1.0, -2.0, 2.0]),
        ("played", {"credit": "rloo"}, [-3.0, -1.5, -2.0, 2.0]),
        # normalised over the turns of episodes of -0.5, 0.5, -1, 1: mean 0, variance 0.625
        ("kept", {"normalise": True}, [-0.6324555, 0.6324555, -1.2649111, 1.2649111]),
        # and of -2, -1, 3, -1, 1: mean 0, variance 16 / 5
        ("played", {"normalise": True}, [-1.1180340, -0.5590170, -0.5590170, 0.5590170]),
    ],
)
def test_advantages_are_over_those_kept_or_all_that_were_played(
    make_learner: Callable[..., Learner], over: str, changes: dict[str, Any], expected: list[float]
):
    learner = make_learner("broken", credit_over=over, gamma=1.0, **changes)
    whole = [*group(0.0, 1.0), member(5.0, stop="invalid"), *group(2.0, 4.0, seed=1), member(9.0, stop="env_error")]
    kept = learner.kept(whole, 99)
    assert kept == [whole[place] for place in (0, 1, 3, 4)]
    _, trained_on = learner._credit(whole, kept)
    found = [one.advantages.tolist() for one in trained_on]
    assert found == [pytest.approx([advantage] * 2, rel=1e-6) for advantage in expected]


def test_of_one_that_is_kept_alone_only_those_played_tell_something(make_learner: Callable[..., Learner]):
    whole = [member(1.0), member(0.0, stop="invalid")]
    for over, advantage in (("kept", 0.0), ("played", 0.5)):
        (found,) = make_learner("broken", credit_over=over, gamma=1.0)._credit(whole, whole[:1])[1]
        assert found.advantages.tolist() == [advantage] * 2


def test_what_is_told_of_groups():
    found = groups.figures([*group(0, 4), *group(1, 1, seed=1), member(3.0, 2)])
    assert found == {"group_std": 1.0, "varied_groups": 0.5}  # spreads 2 and 0; who is alone says nothing
    assert groups.figures([member(1.0, 0), member(2.0, 1)]) == {}
    assert groups.figures([replace(member(1.0), turns=())]) == {}
