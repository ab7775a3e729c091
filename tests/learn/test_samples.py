from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_agents.errors import TrainingError
from vlm_agents.learn.credit import Gae, normalised, sampled_values
from vlm_agents.learn.samples import Sample, build, credited, to_targets, token_emphasis, usable
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Renderer
from vlm_agents.types import Message, Parsed, Reply, Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
RED, BLUE = (Picture(Image.new("RGB", (2, 2), colour)) for colour in ("red", "blue"))


def samples_of(episodes: Sequence[Trajectory], renderer: Renderer) -> list[Sample]:
    credit = normalised(Gae(gamma=0.9, lam=0.8)(episodes, sampled_values(episodes), 0.0))
    return credited(build(episodes, renderer, thought_coef=0.5), episodes, credit)


# ---- emphasis --------------------------------------------------------------------------------------------------------
# text:    {"t":"  é  日本  ","a":"  go  "}  and the end of turn
# range:   0-6  6-7 7-9  9-16   16-18 18-20 20-20
REPLY = Reply('{"t":"é日本","a":"go"}', token_ids=(5, 3, 4, 6, 2, 7, 1))


def test_thought_tokens_weigh_less_and_characters_are_counted_not_bytes(renderer: Renderer):
    weights = token_emphasis(REPLY, Parsed("go", thought_span=(6, 9), action_span=(16, 18)), renderer, 0.5)
    assert weights.tolist() == [1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert weights.dtype == np.float32


@pytest.mark.parametrize(
    "parsed",
    [Parsed(None, (6, 9), error="illegal"), Parsed("go", action_span=(16, 18))],
    ids=["broken", "terse"],
)
def test_all_tokens_weigh_one_without_a_legible_thought(renderer: Renderer, parsed: Parsed):
    assert token_emphasis(REPLY, parsed, renderer, 0.5).tolist() == [1.0] * 7


def test_a_token_across_an_end_of_the_thought_is_structure(renderer: Renderer):
    # the thought is `"é ` (5-8); the token `{"t":"` (0-6) also opens it, and ` "` (7-9) closes it
    weights = token_emphasis(Reply('{"t":"é "', token_ids=(5, 3, 8)), Parsed("go", (5, 8)), renderer, 0.5)
    assert weights.tolist() == [1.0, 0.5, 1.0]


def test_the_first_bytes_of_a_character_belong_to_it_and_the_end_of_turn_to_no_thought(renderer: Renderer):
    # token 0 has no text of its own and stands before é (0-1); the thought is the whole text, token 1 ends the turn
    weights = token_emphasis(Reply("é", token_ids=(0, 3, 1)), Parsed("go", (0, 1)), renderer, 0.5)
    assert weights.tolist() == [0.5, 0.5, 1.0]


def test_a_token_that_touches_the_action_is_action_even_inside_the_thought(renderer: Renderer):
    # go (2-4) was read as the action out of the thought (0-5)
    parsed = Parsed("go", thought_span=(0, 5), action_span=(2, 4))
    weights = token_emphasis(Reply("xygoz", token_ids=(9, 10, 2, 11)), parsed, renderer, 0.5)
    assert weights.tolist() == [0.5, 0.5, 1.0, 0.5]


# ---- samples ---------------------------------------------------------------------------------------------------------
def test_a_sample_is_exactly_what_was_sampled(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    turn = make_turn([2, 9], [5, 3, 1], reward=1.0, value=0.25, logprobs=[-0.1, -0.2, -0.3], images=(RED, BLUE))
    turn = replace(turn, prompt=(Message("user", (BLUE, "earlier")), *turn.prompt), parsed=Parsed("go", (6, 7)))
    (sample,) = samples_of([make_episode(turn, seed=7)], renderer)
    assert sample.row.ident == "words/seed 7/turn 0"
    assert sample.row.input_ids.tolist() == [2, 9, 5, 3, 1]
    assert sample.row.spans == ((2, 5),)
    assert sample.row.images == (BLUE, RED, BLUE)
    assert sample.emphasis.tolist() == [1.0, 0.5, 1.0]
    np.testing.assert_allclose(sample.old, [-0.1, -0.2, -0.3])
    assert sample.returns.tolist() == [1.0] * 3
    assert sample.reference is None


def test_the_credit_of_a_turn_is_that_of_its_tokens(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    ended = make_episode(make_turn([2], [9, 1], 0.0, 0.5), make_turn([3], [9], 1.0, 0.6))
    cut = make_episode(make_turn([4], [9, 9, 1], 0.0, 0.7), stop="time_limit", bootstrap=0.5)
    built = samples_of([ended, cut], renderer)
    # A: 0.9*0.6 - 0.5 + 0.72*0.4 = 0.328;  1 - 0.6 = 0.4;  0.9*0.5 - 0.7 = -0.25
    # mean 0.159333, deviations 0.168667, 0.240667, -0.409333, standard deviation sqrt(0.2539227 / 3) = 0.290931
    for sample, advantage, return_ in zip(built, [0.579748, 0.827229, -1.406977], [0.828, 1.0, 0.45], strict=True):
        np.testing.assert_allclose(sample.advantages, np.full(len(sample.old), advantage), rtol=1e-5)
        np.testing.assert_allclose(sample.returns, np.full(len(sample.old), return_), rtol=1e-6)


def test_turns_that_extend_each_other_share_a_row(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    episode = make_episode(
        make_turn([2, 3], [9, 1], reward=1.0, value=0.1, logprobs=[-0.1, -0.2], images=(RED,)),
        make_turn([2, 3, 9, 1, 4], [10, 1], reward=2.0, value=0.2, logprobs=[-0.3, -0.4], images=(RED, BLUE)),
        make_turn([2, 4], [11, 1], value=0.3),  # a new window
        seed=5,
    )
    merged, alone = samples_of([episode], renderer)
    assert merged.row.ident == "words/seed 5/turn 0"
    assert merged.row.input_ids.tolist() == [2, 3, 9, 1, 4, 10, 1]
    assert merged.row.spans == ((2, 4), (5, 7))
    assert merged.row.images == (RED, BLUE)
    np.testing.assert_allclose(merged.old, [-0.1, -0.2, -0.3, -0.4])
    assert merged.emphasis.tolist() == [1.0] * 4
    # A2 = -0.3;  A1 = 2 + 0.9*0.3 - 0.2 - 0.72*0.3 = 1.854;  A0 = 1 + 0.9*0.2 - 0.1 + 0.72*1.854 = 2.41488
    np.testing.assert_allclose(merged.returns, [2.51488, 2.51488, 2.054, 2.054], rtol=1e-6)
    # mean 1.32296, standard deviation sqrt((1.09192^2 + 0.53104^2 + 1.62296^2) / 3) = 1.170227
    np.testing.assert_allclose(merged.advantages, [0.933084, 0.933084, 0.453792, 0.453792], rtol=1e-5)
    assert (alone.row.ident, alone.row.spans) == ("words/seed 5/turn 2", ((2, 4),))


@pytest.mark.parametrize(
    ("prompt", "images"),
    [([2, 3, 9, 5, 4], (RED, BLUE)), ([2, 3, 9], (RED, BLUE)), ([2, 3, 9, 1, 4], (BLUE, RED))],
    ids=["other ids", "too short", "other picture"],
)
def test_turns_that_differ_in_ids_or_pictures_stay_apart(
    renderer: Renderer,
    make_turn: MakeTurn,
    make_episode: MakeEpisode,
    prompt: list[int],
    images: tuple[Picture, ...],
):
    later = make_turn(prompt, [1, 1], images=images)
    assert len(samples_of([make_episode(make_turn([2, 3], [9, 1], images=(RED,)), later)], renderer)) == 2


def test_turns_of_different_episodes_never_merge(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    episodes = [make_episode(make_turn([2], [9])), make_episode(make_turn([2, 9, 3], [9]))]
    assert len(samples_of(episodes, renderer)) == 2


def test_episodes_that_an_env_broke_are_not_usable(make_turn: MakeTurn, make_episode: MakeEpisode):
    good, broken = make_episode(make_turn([2], [9])), make_episode(make_turn([3], [9]), stop="env_error")
    assert usable([broken, good]) == [good]
    with pytest.raises(TrainingError, match=r"none of 2 episodes is usable \(worker died\)"):
        usable([broken, broken])


# ---- targets ---------------------------------------------------------------------------------------------------------
def test_targets_count_tokens_turns_and_rows_in_order(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    chat = make_episode(make_turn([2], [9, 1], value=1.0), make_turn([2, 9, 1, 3], [10], value=2.0))
    single = make_episode(make_turn([4], [11, 11, 1], value=3.0, logprobs=[-3.0, -4.0, -5.0]), seed=1)
    samples = samples_of([chat, single], renderer)
    weights = [np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)]
    targets = to_targets(samples, weights, torch.device("cpu"))
    assert targets.turn.tolist() == [0, 0, 1, 2, 2, 2]
    assert targets.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert targets.first.tolist() == [0, 2, 3]
    assert targets.old.tolist() == [-1.0, -1.0, -1.0, -3.0, -4.0, -5.0]
    assert targets.weight.tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("emphasis", "advantages", "returns"):
        whole = np.concatenate([getattr(sample, name) for sample in samples])
        assert getattr(targets, name).tolist() == whole.tolist()
    floats = (targets.old, targets.emphasis, targets.advantages, targets.returns, targets.weight)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert targets.reference is None


def test_targets_have_the_references_of_samples_that_have_them(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    samples = samples_of([make_episode(make_turn([2], [9, 1]), seed=seed) for seed in range(2)], renderer)
    samples = [replace(sample, reference=np.full(2, -float(index), np.float32)) for index, sample in enumerate(samples)]
    reference = to_targets(samples, [sample.old for sample in samples], torch.device("cpu")).reference
    assert reference is not None
    assert reference.tolist() == [0, 0, -1, -1]
