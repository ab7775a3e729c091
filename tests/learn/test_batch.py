from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_agents.config import AlgoConfig
from vlm_agents.errors import TrainingError
from vlm_agents.learn.batch import collate, microbatches, minibatches, rows, token_weights, usable
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Renderer, Row
from vlm_agents.types import Message, Parsed, Reply, Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
ALGO = AlgoConfig(name="ppo", gamma=0.9, gae_lambda=0.8, thought_coef=0.5)
RED, BLUE = (Picture(Image.new("RGB", (2, 2), colour)) for colour in ("red", "blue"))


def plain_row(length: int, turns: int = 1) -> Row:
    """`turns` replies of one token each at the end of `length` tokens."""
    spans = tuple((length - 2 * turn - 1, length - 2 * turn) for turn in reversed(range(turns)))
    zeros = np.zeros(turns, dtype=np.float32)
    return Row(f"row {length}", np.ones(length, np.int64), (), spans, zeros + 1, zeros, zeros, zeros, zeros)


# ---- token weights ---------------------------------------------------------------------------------------------------
# text:    {"t":"  é  日本  ","a":"  go  "}  and the end of turn
# range:   0-6  6-7 7-9  9-16   16-18 18-20 20-20
REPLY = Reply('{"t":"é日本","a":"go"}', token_ids=(5, 3, 4, 6, 2, 7, 1))


def test_thought_tokens_weigh_less_and_characters_are_counted_not_bytes(renderer: Renderer):
    weights = token_weights(REPLY, Parsed("go", thought_span=(6, 9), action_span=(16, 18)), renderer, 0.5)
    assert weights.tolist() == [1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert weights.dtype == np.float32


@pytest.mark.parametrize(
    "parsed",
    [Parsed(None, (6, 9), error="illegal"), Parsed("go", action_span=(16, 18))],
    ids=["broken", "terse"],
)
def test_all_tokens_weigh_one_without_a_legible_thought(renderer: Renderer, parsed: Parsed):
    assert token_weights(REPLY, parsed, renderer, 0.5).tolist() == [1.0] * 7


def test_a_token_across_an_end_of_the_thought_is_structure(renderer: Renderer):
    # the thought is `"é ` (5-8); the token `{"t":"` (0-6) also opens it, and ` "` (7-9) closes it
    weights = token_weights(Reply('{"t":"é "', token_ids=(5, 3, 8)), Parsed("go", (5, 8)), renderer, 0.5)
    assert weights.tolist() == [1.0, 0.5, 1.0]


def test_the_first_bytes_of_a_character_belong_to_it_and_the_end_of_turn_to_no_thought(renderer: Renderer):
    # token 0 has no text of its own and stands before é (0-1); the thought is the whole text, token 1 ends the turn
    weights = token_weights(Reply("é", token_ids=(0, 3, 1)), Parsed("go", (0, 1)), renderer, 0.5)
    assert weights.tolist() == [0.5, 0.5, 1.0]


def test_a_token_that_touches_the_action_is_action_even_inside_the_thought(renderer: Renderer):
    # go (2-4) was read as the action out of the thought (0-5)
    parsed = Parsed("go", thought_span=(0, 5), action_span=(2, 4))
    weights = token_weights(Reply("xygoz", token_ids=(9, 10, 2, 11)), parsed, renderer, 0.5)
    assert weights.tolist() == [0.5, 0.5, 1.0, 0.5]


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_row_is_exactly_what_was_sampled(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    turn = make_turn([2, 9], [5, 3, 1], reward=1.0, value=0.25, logprobs=[-0.1, -0.2, -0.3], images=(RED, BLUE))
    turn = replace(turn, prompt=(Message("user", (BLUE, "earlier")), *turn.prompt), parsed=Parsed("go", (6, 7)))
    (row,) = rows([make_episode(turn, seed=7)], renderer, ALGO)
    assert row.ident == "words/seed 7/turn 0"
    assert row.input_ids.tolist() == [2, 9, 5, 3, 1]
    assert row.spans == ((2, 5),)
    assert row.images == (BLUE, RED, BLUE)
    assert row.token_weight.tolist() == [1.0, 0.5, 1.0]
    np.testing.assert_allclose(row.old_logprobs, [-0.1, -0.2, -0.3])
    assert (row.old_values.tolist(), row.returns.tolist()) == ([0.25], [1.0])


def test_advantages_are_normalised_over_all_turns_and_returns_are_not(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    ended = make_episode(make_turn([2], [9], 0.0, 0.5), make_turn([3], [9], 1.0, 0.6))
    cut = make_episode(make_turn([4], [9], 0.0, 0.7), stop="time_limit", bootstrap=0.5)
    built = rows([ended, cut], renderer, ALGO)
    # A: 0.9*0.6 - 0.5 + 0.72*0.4 = 0.328;  1 - 0.6 = 0.4;  0.9*0.5 - 0.7 = -0.25
    # mean 0.159333, deviations 0.168667, 0.240667, -0.409333, standard deviation sqrt(0.2539227 / 3) = 0.290931
    np.testing.assert_allclose([row.advantages[0] for row in built], [0.579748, 0.827229, -1.406977], rtol=1e-5)
    np.testing.assert_allclose([row.returns[0] for row in built], [0.828, 1.0, 0.45], rtol=1e-6)


def test_turns_that_extend_each_other_share_a_row(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    episode = make_episode(
        make_turn([2, 3], [9, 1], value=0.1, logprobs=[-0.1, -0.2], images=(RED,)),
        make_turn([2, 3, 9, 1, 4], [10, 1], value=0.2, logprobs=[-0.3, -0.4], images=(RED, BLUE)),
        make_turn([2, 4], [11, 1], value=0.3),  # a new window
        seed=5,
    )
    merged, alone = rows([episode], renderer, ALGO)
    assert merged.ident == "words/seed 5/turn 0"
    assert merged.input_ids.tolist() == [2, 3, 9, 1, 4, 10, 1]
    assert merged.spans == ((2, 4), (5, 7))
    assert merged.images == (RED, BLUE)
    np.testing.assert_allclose(merged.old_logprobs, [-0.1, -0.2, -0.3, -0.4])
    np.testing.assert_allclose(merged.old_values, [0.1, 0.2])
    assert [len(field) for field in (merged.token_weight, merged.advantages, merged.returns)] == [4, 2, 2]
    assert (alone.ident, alone.spans) == ("words/seed 5/turn 2", ((2, 4),))


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
    images: tuple[Image.Image, ...],
):
    later = make_turn(prompt, [1, 1], images=images)
    assert len(rows([make_episode(make_turn([2, 3], [9, 1], images=(RED,)), later)], renderer, ALGO)) == 2


def test_turns_of_different_episodes_never_merge(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    episodes = [make_episode(make_turn([2], [9])), make_episode(make_turn([2, 9, 3], [9]))]
    assert len(rows(episodes, renderer, ALGO)) == 2


def test_episodes_that_an_env_broke_are_left_out(renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode):
    good, broken = make_episode(make_turn([2], [9])), make_episode(make_turn([3], [9]), stop="env_error")
    assert usable([broken, good]) == [good]
    assert [row.input_ids[0] for row in rows([broken, good], renderer, ALGO)] == [2]
    with pytest.raises(TrainingError, match=r"none of 2 episodes is usable \(worker died\)"):
        rows([broken, broken], renderer, ALGO)


def test_replies_that_no_model_of_ours_sampled_are_refused(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    with pytest.raises(TrainingError, match=r"words/seed 3/turn 0: .* no value"):
        rows([make_episode(make_turn([2], [9], value=None), seed=3)], renderer, ALGO)


# ---- batches ---------------------------------------------------------------------------------------------------------
def test_collate_counts_tokens_and_turns_in_row_order(
    renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    chat = make_episode(make_turn([2], [9, 1], value=1.0), make_turn([2, 9, 1, 3], [10], value=2.0))
    single = make_episode(make_turn([4], [11, 11, 1], value=3.0, logprobs=[-3.0, -4.0, -5.0]), seed=1)
    batch = collate(rows([chat, single], renderer, ALGO), renderer)
    assert batch.tokens.input_ids.tolist() == [[2, 9, 1, 3, 10], [4, 11, 11, 1, 0]]
    assert batch.tokens.reply_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]]
    assert batch.turn_of_token.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.old_logprobs.tolist() == [-1.0, -1.0, -1.0, -3.0, -4.0, -5.0]
    assert batch.old_values.tolist() == [1.0, 2.0, 3.0]
    assert batch.idents == ("words/seed 0/turn 0", "words/seed 1/turn 0")
    assert batch.advantages.dtype == batch.returns.dtype == batch.token_weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("turns", "sizes"), [(128, [10]), (10, [10]), (6, [5, 5]), (4, [5, 5]), (3, [3, 4, 3]), (1, [1] * 10)]
)
def test_minibatches_are_even_and_hold_every_row_once(turns: int, sizes: list[int]):
    all_rows = [plain_row(length) for length in range(3, 13)]
    found = minibatches(all_rows, turns, np.random.default_rng(0))
    assert [len(part) for part in found] == sizes
    assert sorted(len(row.input_ids) for part in found for row in part) == list(range(3, 13))
    assert [row.ident for part in found for row in part] != [row.ident for row in all_rows]
    again = minibatches(all_rows, turns, np.random.default_rng(0))
    assert [[row.ident for row in part] for part in found] == [[row.ident for row in part] for part in again]


def test_minibatches_count_turns_not_rows():
    all_rows = [plain_row(20, turns=6)] * 3 + [plain_row(3)] * 18
    for seed in range(10):
        sizes = [sum(len(row.spans) for row in part) for part in minibatches(all_rows, 18, np.random.default_rng(seed))]
        assert sum(sizes) == 36
        assert [abs(size - 18) <= 3 for size in sizes] == [True, True]  # off by at most half the longest row


def test_microbatches_cut_by_padded_tokens_longest_first():
    found = microbatches([plain_row(length) for length in (4, 9, 5, 30, 10, 4)], max_tokens=20)
    # 30 is over the budget and alone; 2 * 10; 4 * 5
    assert [[len(row.input_ids) for row in part] for part in found] == [[30], [10, 9], [5, 4, 4]]
