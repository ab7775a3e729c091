from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_agents.errors import TrainingError
from vlm_agents.learn.averages import Average, over_budget, over_rows, over_tokens, over_turns
from vlm_agents.learn.batches import Shares, microbatches
from vlm_agents.learn.credit import Gae, normalised, sampled_values
from vlm_agents.learn.critic import Critic
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.losses import clipped, entropy_bonus, k3, reference_kl
from vlm_agents.learn.samples import Sample, build, credited
from vlm_agents.learn.update import Objective, go_through, mismatch_kl, read_once
from vlm_agents.tensors import Renderer, Row, Scores
from vlm_agents.types import Trajectory, Turn

MakeTurn = Callable[..., Turn]
MakeEpisode = Callable[..., Trajectory]
MakeSamples = Callable[..., list[Sample]]
Textbook = Callable[[Any, Sequence[Sample]], Tensor]
WHOLE = 10_000  # tokens: everything in one micro-batch


def critic_of(agent: Any) -> Critic:
    engine = TorchEngine(list(agent.critic.parameters()), weight_decay=0.0, max_grad_norm=1.0)
    return Critic(agent.value, engine, lambda _: 1e-2, coef=0.5, epochs=0, minibatch_turns=1000, warmup=0)


def ppo(agent: Any, kl_coef: float = 0.0) -> Objective:
    terms = [(1.0, clipped(0.2, 0.2)), (0.5, critic_of(agent).term), (0.1, entropy_bonus), (kl_coef, reference_kl(k3))]
    return Objective(terms if kl_coef else terms[:-1], over_turns)


def flat_gradient(agent: Any) -> Tensor:
    """All gradients in one vector; afterwards there are none."""
    found = torch.cat([parameter.grad.flatten() for parameter in agent.parameters() if parameter.grad is not None])
    agent.zero_grad()
    return found


def move(agent: Any, by: float = 0.1) -> None:
    """Away from where it was sampled: ratios differ, some are clipped."""
    with torch.no_grad():
        agent.policy.bias.add_(by * torch.randn(12))


# ---- the textbook's forms, one reply after another, without a batch --------------------------------------------------
def tokens_of(agent: Any, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """New and old log-probs, and advantages, of a row's reply tokens."""
    return (
        agent.score([sample.row]).logprobs,
        torch.from_numpy(sample.old).double(),
        torch.from_numpy(sample.advantages).double(),
    )


def surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.min(ratio * advantage, torch.clip(ratio, 1 - low, 1 + high) * advantage)


def k3_of(reference: Tensor, new: Tensor) -> Tensor:
    return (reference - new).exp() - (reference - new) - 1


def textbook_ppo(agent: Any, samples: Sequence[Sample]) -> Tensor:
    """One ratio a turn, of the product of its tokens' probabilities; every number a turn's, and their mean."""
    losses = []
    for sample in samples:
        scores = agent.score([sample.row])
        arrays = (sample.old, sample.emphasis, sample.advantages, sample.returns, sample.reference)
        host = [torch.from_numpy(array).double() for array in arrays if array is not None]
        first = 0
        for length in sample.row.reply_lengths:
            turn = slice(first, first + length)
            new, entropy = scores.logprobs[turn], scores.entropy[turn]
            old, emphasis, advantages, returns, reference = (array[turn] for array in host)
            ratio = torch.exp((emphasis * (new - old)).sum())
            policy = -surrogate(ratio, advantages[0], 0.2, 0.2)
            value = 0.5 * (agent.value(scores.states[first]) - returns[0]) ** 2
            losses.append(policy + 0.5 * value - 0.1 * entropy.mean() + 0.1 * k3_of(reference, new).mean())
            first += length
    return torch.stack([loss.squeeze() for loss in losses]).mean()


def textbook_dapo(agent: Any, samples: Sequence[Sample]) -> Tensor:
    """1 / sum |o_i| * sum_i sum_t min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i)."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for new, old, advantages in (tokens_of(agent, sample) for sample in samples):
        total = total - surrogate((new - old).exp(), advantages, 0.2, 0.28).sum()
        tokens += len(new)
    return total / tokens


def textbook_grpo(agent: Any, samples: Sequence[Sample]) -> Tensor:
    """1 / G * sum_i 1 / |o_i| * sum_t (min(...) - beta * k3)."""
    rows = []
    for sample in samples:
        new, old, advantages = tokens_of(agent, sample)
        assert sample.reference is not None
        kl = k3_of(torch.from_numpy(sample.reference).double(), new)
        rows.append(-(surrogate((new - old).exp(), advantages, 0.2, 0.2) - 0.04 * kl).sum() / len(new))
    return torch.stack(rows).sum() / len(samples)


def textbook_dr_grpo(agent: Any, samples: Sequence[Sample]) -> Tensor:
    """1 / G * sum_i 1 / budget * sum_t min(...)."""
    found = (tokens_of(agent, sample) for sample in samples)
    rows = [-surrogate((new - old).exp(), advantages, 0.2, 0.2).sum() / 64 for new, old, advantages in found]
    return torch.stack(rows).sum() / len(samples)


def textbook_gspo(agent: Any, samples: Sequence[Sample]) -> Tensor:
    """1 / G * sum_i min(s_i A_i, clip(s_i) A_i), s_i the geometric mean of the ratios of a row's tokens."""
    found = (tokens_of(agent, sample) for sample in samples)
    rows = [
        -surrogate((new.sum() - old.sum()).div(len(new)).exp(), advantages[0], 0.1, 0.12)
        for new, old, advantages in found
    ]
    return torch.stack(rows).sum() / len(samples)


TEXTBOOK: dict[str, tuple[Callable[[Any], Objective], Textbook]] = {
    "ppo": (partial(ppo, kl_coef=0.1), textbook_ppo),
    "dapo": (lambda _: Objective([(1.0, clipped(0.2, 0.28, "token"))], over_tokens), textbook_dapo),
    "grpo": (
        lambda _: Objective([(1.0, clipped(0.2, 0.2, "token")), (0.04, reference_kl(k3))], over_rows),
        textbook_grpo,
    ),
    "dr_grpo": (lambda _: Objective([(1.0, clipped(0.2, 0.2, "token"))], over_budget(64)), textbook_dr_grpo),
    "gspo": (lambda _: Objective([(1.0, clipped(0.1, 0.12, "row", "mean"))], over_rows), textbook_gspo),
}
# tokens of the replies of each row: 4 rows, 8 turns, 4 + 8 + 4 + 16 = 32 tokens, so that fp32 holds all weights exactly
EXACT = [(1, 1, 2), (8,), (2, 2), (8, 8)]
RAGGED = [(3, 1, 5), (7,), (2, 6), (11, 4), (1,)]


def chats(agent: Any, replies: Sequence[Sequence[int]], by_turn: bool) -> list[Sample]:
    """A row for each; credit and emphasis differ by turn, or a row has one advantage and no emphasis."""
    rng, samples = np.random.default_rng(3), []
    for index, lengths in enumerate(replies):
        ends = np.cumsum([3 + length for length in lengths]).tolist()
        spans = tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))
        row = Row(f"row {index}", rng.integers(2, 12, ends[-1]), (), spans)
        advantages, returns = rng.normal(size=(2, len(lengths))).astype(np.float32)
        tokens = sum(lengths)
        with torch.no_grad():
            old = agent.score([row]).logprobs.numpy().astype(np.float32)
        samples.append(
            Sample(
                row,
                behaviour=old,
                old=old,
                emphasis=rng.choice([0.2, 1.0], tokens).astype(np.float32) if by_turn else np.ones(tokens, np.float32),
                advantages=np.repeat(advantages if by_turn else advantages[:1].repeat(len(lengths)), lengths),
                returns=np.repeat(returns, lengths),
                reference=old + 0.3 * rng.normal(size=tokens).astype(np.float32),
            )
        )
    return samples


@pytest.mark.parametrize("budget", [WHOLE, 40, 1], ids=["whole", "cut", "row by row"])
@pytest.mark.parametrize(("replies", "tolerance"), [(EXACT, 1e-12), (RAGGED, 1e-7)], ids=["exact", "ragged"])
@pytest.mark.parametrize("name", TEXTBOOK)
def test_terms_times_weights_are_the_textbooks_form(
    tiny_agent: Any, name: str, replies: list[tuple[int, ...]], tolerance: float, budget: int
):
    """In fp64. Weights are fp32: off by 6e-8 of themselves, where they aren't sums of powers of two."""
    agent = tiny_agent().double()
    make_objective, textbook = TEXTBOOK[name]
    samples, losses = chats(agent, replies, by_turn=name == "ppo"), []
    move(agent, by=0.3)
    expected = textbook(agent, samples)
    expected.backward()
    slope = flat_gradient(agent)
    assert slope.norm() > 0.01

    def backward(loss: Tensor) -> None:
        losses.append(loss.item())
        loss.backward()

    passed = go_through(agent, samples, make_objective(agent), None, Shares(budget), backward)
    assert len(losses) == {WHOLE: 1, 40: 2 if replies == EXACT else 3, 1: len(samples)}[budget]
    assert sum(losses) == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    torch.testing.assert_close(flat_gradient(agent), slope, rtol=tolerance, atol=tolerance)
    assert 0 < passed.seen["clip_fraction"].mean() < 1


@pytest.mark.parametrize("average", [over_rows, over_tokens, over_budget(64)])
def test_what_is_told_is_a_mean_over_turns_whatever_the_loss_is(tiny_agent: Any, average: Average):
    """Else a KL would be compared with `target_kl` in another unit for each algorithm."""
    agent = tiny_agent()
    samples = chats(agent, RAGGED, by_turn=True)
    move(agent, by=0.3)
    found = [
        go_through(agent, samples, Objective([(1.0, clipped(0.2, 0.2))], one), None, Shares(WHOLE), None).mean(
            "approx_kl"
        )
        for one in (average, over_turns)
    ]
    assert found[0] == found[1] > 0


# ---- exact accumulation ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ([8] * 8, WHOLE, [8]),
        ([8] * 8, 16, [2, 2, 2, 2]),
        ([8] * 8, 24, [3, 3, 2]),
        ([8] * 8, 1, [1] * 8),
        ([4, 4, 6, 6, 8, 8, 10, 10], 20, [2, 2, 3, 1]),
        ([3, 4, 5, 6, 7, 8, 9, 30], 30, [1, 3, 4]),
    ],
    ids=["8x1", "4x2", "uneven", "8 alone", "ragged", "one long"],
)
def test_micro_batches_change_nothing(
    tiny_agent: Any, make_samples: MakeSamples, lengths: list[int], budget: int, sizes: list[int]
):
    agent = tiny_agent()
    samples = [replace(sample, reference=sample.old) for sample in make_samples(agent, lengths)]
    move(agent)
    textbook_ppo(agent, samples).backward()
    expected = flat_gradient(agent)
    assert expected.norm() > 0.1
    whole = go_through(agent, samples, ppo(agent, kl_coef=0.1), critic_of(agent), Shares(WHOLE), None)
    assert 0 < whole.mean("clip_fraction") < 1
    assert all(parameter.grad is None for parameter in agent.parameters())
    assert [len(part) for part in microbatches(samples, budget)] == sizes
    cut = go_through(agent, samples, ppo(agent, kl_coef=0.1), critic_of(agent), Shares(budget), Tensor.backward)
    torch.testing.assert_close(flat_gradient(agent), expected, rtol=0, atol=1e-6)
    assert whole.turns == cut.turns == 8
    for name in whole.seen:
        assert cut.mean(name) == pytest.approx(whole.mean(name), rel=1e-6, abs=1e-6)
    # what the critic read, in the order of the micro-batches, which are those of the whole
    for name in ("states", "returns"):
        one, other = (torch.cat([getattr(part, name) for part in passed.read]) for passed in (cut, whole))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_chat_in_one_row_is_worth_the_same_as_a_row_per_turn(
    tiny_agent: Any, renderer: Renderer, make_turn: MakeTurn, make_episode: MakeEpisode
):
    turns = [
        make_turn([2, 3], [9, 1], reward=1.0, value=0.3, logprobs=[-2.0, -2.2]),
        make_turn([2, 3, 9, 1, 4], [10, 10, 1], reward=-1.0, value=0.1, logprobs=[-2.1, -2.0, -2.6]),
        make_turn([2, 3, 9, 1, 4, 10, 10, 1, 5], [11, 1], reward=0.5, value=0.2, logprobs=[-3.0, -2.5]),
    ]
    agent, found = tiny_agent(), []
    for episodes, spans in (([make_episode(*turns)], [3]), ([make_episode(turn) for turn in turns], [1, 1, 1])):
        # gamma 0: a turn's credit doesn't depend on the next one
        credit = normalised(Gae(gamma=0.0, lam=0.95)(episodes, sampled_values(episodes), 0.0))
        samples = credited(build(episodes, renderer, thought_coef=0.5), episodes, credit)
        assert [len(sample.row.spans) for sample in samples] == spans
        passed = go_through(agent, samples, ppo(agent), None, Shares(WHOLE), Tensor.backward)
        means = torch.tensor([passed.mean(name) for name in ("policy_loss", "value_loss")])
        found.append((flat_gradient(agent), means))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# ---- what a pass leaves ----------------------------------------------------------------------------------------------
def test_a_critic_reads_each_turn_once_and_none_reads_nothing(tiny_agent: Any, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = make_samples(agent, [4, 6, 9, 5])
    passed = go_through(agent, samples, ppo(agent), critic_of(agent), Shares(12), None)
    assert sorted(torch.cat([part.returns for part in passed.read]).tolist()) == sorted(
        sample.returns[0] for sample in samples
    )
    assert go_through(agent, samples, ppo(agent), None, Shares(12), None).read == []


def test_a_term_of_no_weight_is_seen_and_moves_nothing(tiny_agent: Any, make_samples: MakeSamples):
    agent = tiny_agent()
    samples, found = make_samples(agent, [6] * 4), []
    for terms in ([(1.0, clipped(0.2, 0.2))], [(1.0, clipped(0.2, 0.2)), (0.0, entropy_bonus)]):
        passed = go_through(agent, samples, Objective(terms, over_turns), None, Shares(WHOLE), Tensor.backward)
        found.append(flat_gradient(agent))
    assert torch.equal(*found)
    assert passed.mean("entropy") > 1


# ---- log-probs of other passes ---------------------------------------------------------------------------------------
def test_what_is_read_once_are_the_log_probs_of_now_by_sample(tiny_agent: Any, make_samples: MakeSamples):
    agent = tiny_agent()
    samples = make_samples(agent, [5, 9, 4, 7, 8])
    first = read_once(agent, samples, [range(5)], Shares(20))
    assert all(np.allclose(own, sample.old) for own, sample in zip(first, samples, strict=True))
    move(agent)
    for sample, own in zip(samples, read_once(agent, samples, [[3, 1], [0, 4, 2]], Shares(20)), strict=True):
        now = agent.score([sample.row]).logprobs.detach().numpy()
        np.testing.assert_allclose(own, now, rtol=1e-5)
        assert not np.allclose(now, sample.old)


def test_mismatch_kl_is_a_mean_over_turns(tiny_agent: Any):
    agent = tiny_agent()
    samples = chats(agent, [(2, 1), (3,)], by_turn=True)
    samples = [replace(sample, old=sample.behaviour + np.float32(0.1)) for sample in samples]
    # drifts 0.2, 0.1 and 0.3 of a turn; exp(d) - 1 - d: 0.0214028, 0.0051709, 0.0498588
    assert mismatch_kl(samples) == pytest.approx((0.0214028 + 0.0051709 + 0.0498588) / 3, rel=1e-4)


# ---- what can't go on ------------------------------------------------------------------------------------------------
def test_a_number_that_is_not_finite_names_its_rows_before_any_gradient(tiny_agent: Any, make_samples: MakeSamples):
    agent, losses = tiny_agent(), []
    samples = make_samples(agent, [6] * 4)
    samples[2] = replace(samples[2], advantages=samples[2].advantages * np.nan)
    with pytest.raises(TrainingError, match=r"ppo/policy_loss isn't finite over 1 rows \(words/seed 2/turn 0\): lower"):
        go_through(agent, samples, ppo(agent), None, Shares(WHOLE), losses.append)
    assert losses == []


def test_scores_that_are_not_finite_are_refused_by_the_first_term(tiny_agent: Any, make_samples: MakeSamples):
    agent = tiny_agent()
    samples, score = make_samples(agent, [6] * 4), agent.score

    def broken(rows: Sequence[Row]) -> Scores:
        scores = score(rows)
        return replace(scores, logprobs=scores.logprobs * torch.nan)

    agent.score = broken
    with pytest.raises(TrainingError, match=r"ppo/policy_loss isn't finite over 4 rows"):
        go_through(agent, samples, ppo(agent), None, Shares(WHOLE), Tensor.backward)
