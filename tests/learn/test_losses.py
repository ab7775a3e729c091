"""Every term is checked for its value and for the direction of its gradient: a flipped sign fails both."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlm_agents.learn.losses import (
    Unit,
    clipped,
    entropy_bonus,
    k3,
    pooled_mean,
    pooled_sum,
    reference_kl,
    turn_entropy,
    value_loss,
)
from vlm_agents.learn.samples import Targets
from vlm_agents.tensors import Scores

# two turns: the first has tokens 0 and 1, the second token 2
TURN_OF_TOKEN = torch.tensor([0, 0, 1])


def gradient(loss: Tensor, of: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found.tolist()


def scores(logprobs: Tensor) -> Scores:
    nothing = torch.zeros(len(logprobs))
    return Scores(logprobs, nothing, nothing[:, None])


def make_targets(
    old: Tensor,
    advantages: Sequence[float] | None = None,
    emphasis: Sequence[float] | None = None,
    reference: Tensor | None = None,
    turn: Tensor = TURN_OF_TOKEN,
) -> Targets:
    """In one row; `advantages` of each token."""
    nothing = torch.zeros(len(old))
    return Targets(
        behaviour=old,
        old=old,
        emphasis=nothing + 1 if emphasis is None else torch.tensor(emphasis),
        advantages=nothing if advantages is None else torch.tensor(advantages),
        returns=nothing,
        reference=reference,
        weight=nothing,
        turn=turn,
        row=torch.zeros_like(turn),
        first=torch.tensor([0]),
    )


def test_sums_and_means_of_a_unit_are_each_of_its_tokens():
    per_token = torch.tensor([1.0, 3.0, 5.0])
    assert pooled_sum(per_token, TURN_OF_TOKEN).tolist() == [4.0, 4.0, 5.0]
    assert pooled_mean(per_token, TURN_OF_TOKEN).tolist() == [2.0, 2.0, 5.0]


# ---- the clipped surrogate -------------------------------------------------------------------------------------------
def test_policy_loss_by_hand():
    term = clipped(0.2, 0.2)(
        scores(torch.tensor([-1.0, -0.5, -2.0])),
        make_targets(torch.tensor([-1.4, -0.6, -1.9]), [2.0, 2.0, -1.0], emphasis=[0.5, 1.0, 1.0]),
    )
    # turn 0: log ratio 0.5*0.4 + 0.1 = 0.3, ratio 1.349859, clipped to 1.2, times 2, negated
    # turn 1: log ratio -0.1, ratio 0.904837, inside the clip range, times -1, negated
    torch.testing.assert_close(term.loss, torch.tensor([-2.4, -2.4, 0.904837]), rtol=1e-6, atol=0)
    torch.testing.assert_close(term.seen["policy_loss"], term.loss, rtol=0, atol=0)
    torch.testing.assert_close(term.seen["ratio"], torch.tensor([1.349859, 1.349859, 0.904837]), rtol=1e-6, atol=0)
    # of the tokens unweighted, exp(d) - 1 - d: d is 0.5 and -0.1
    kl = torch.tensor([0.148721, 0.148721, 0.004837])
    torch.testing.assert_close(term.seen["approx_kl"], kl, rtol=1e-4, atol=0)
    assert term.seen["clip_fraction"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("unit", "pool", "log_ratios"),
    [
        ("token", "sum", [0.2, 0.1, -0.1]),  # a token's own, with its emphasis
        ("turn", "mean", [0.15, 0.15, -0.1]),
        ("row", "sum", [0.2, 0.2, 0.2]),
        ("row", "mean", [0.2 / 3, 0.2 / 3, 0.2 / 3]),
    ],
)
def test_ratios_of_other_units_by_hand(unit: Unit, pool: str, log_ratios: list[float]):
    targets = make_targets(torch.tensor([-1.4, -0.6, -1.9]), [2.0, 2.0, -1.0], emphasis=[0.5, 1.0, 1.0])
    new = torch.tensor([-1.0, -0.5, -2.0])
    term = clipped(0.2, 0.2, unit, pool)(scores(new), targets)  # type: ignore[arg-type]
    torch.testing.assert_close(term.seen["ratio"], torch.tensor(log_ratios).exp(), rtol=1e-6, atol=0)
    # whatever the unit, of the tokens of a turn
    kl = torch.tensor([0.148721, 0.148721, 0.004837])
    torch.testing.assert_close(term.seen["approx_kl"], kl, rtol=1e-4, atol=0)


def test_policy_loss_raises_the_probability_of_good_turns_by_emphasis():
    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    targets = make_targets(logprobs.detach(), [2.0, 2.0, -3.0], emphasis=[0.5, 1.0, 1.0])
    loss = clipped(0.2, 0.2)(scores(logprobs), targets).loss
    # a turn's loss once, as its tokens' weights make it
    loss = loss * torch.tensor([0.5, 0.5, 1.0])
    # at ratio 1: -advantage * emphasis; negative, so descent raises the log-probs of the turn with the good advantage
    assert gradient(loss, logprobs) == pytest.approx([-1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.3, 1.0, 0.0),  # good and already more likely: enough
        (1.3, -1.0, 1.3),  # bad and yet more likely: still pulled back
        (0.7, 1.0, -0.7),  # good and yet less likely: still pulled up
        (0.7, -1.0, 0.0),  # bad and already less likely: enough
        (1.1, 1.0, -1.1),  # inside the range nothing is clipped
        (0.9, -1.0, 0.9),
    ],
)
@pytest.mark.parametrize("unit", ["token", "turn", "row"])
def test_clip_kills_the_gradient_exactly_where_it_must(unit: Unit, ratio: float, advantage: float, slope: float):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    targets = make_targets(torch.zeros(1), [advantage], turn=torch.zeros(1, dtype=torch.int64))
    term = clipped(0.2, 0.2, unit)(scores(logprobs), targets)
    # d(-ratio * advantage) / d log-prob = -ratio * advantage
    assert gradient(term.loss, logprobs) == pytest.approx([slope])
    assert term.seen["clip_fraction"].tolist() == [float(abs(ratio - 1) > 0.2)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "fraction"),
    [(1.25, 1.0, -1.25, 0.0), (1.35, 1.0, 0.0, 1.0), (0.85, -1.0, 0.85, 0.0), (0.75, -1.0, 0.0, 1.0)],
)
def test_the_two_ends_of_the_clip_range_are_apart(ratio: float, advantage: float, slope: float, fraction: float):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    targets = make_targets(torch.zeros(1), [advantage], turn=torch.zeros(1, dtype=torch.int64))
    term = clipped(0.2, 0.3)(scores(logprobs), targets)  # from 0.8 to 1.3
    assert gradient(term.loss, logprobs) == pytest.approx([slope])
    assert term.seen["clip_fraction"].tolist() == [fraction]


# ---- other terms -----------------------------------------------------------------------------------------------------
def test_value_loss_moves_values_to_returns():
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([3.0, 4.0]))
    # 0.5 * 2^2 and 0.5 * 1^2; gradient value - return
    assert loss.tolist() == [2.0, 0.5]
    assert gradient(loss, values) == [-2.0, 1.0]


def test_the_entropy_bonus_raises_entropy():
    entropy = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    targets = make_targets(torch.zeros(3))
    term = entropy_bonus(replace(scores(torch.zeros(3)), entropy=entropy), targets)
    assert term.seen["entropy"].tolist() == [0.5, 2.0, 1.0]
    assert gradient(term.loss, entropy) == [-1.0] * 3


def test_reference_kl_pulls_the_policy_to_the_reference():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.5, -0.5])
    term = reference_kl(k3)(scores(logprobs), make_targets(logprobs.detach(), reference=reference))
    # exp(-0.5) - 1 + 0.5 = 0.106531 and exp(0.5) - 1 - 0.5 = 0.148721; token 2 agrees with the reference
    torch.testing.assert_close(term.loss, torch.tensor([0.106531, 0.148721, 0.0]), rtol=1e-5, atol=1e-7)
    assert term.seen["kl_reference"].tolist() == term.loss.tolist()
    # 1 - exp(-0.5) above the reference, 1 - exp(0.5) below it
    assert gradient(term.loss, logprobs) == pytest.approx([0.3934693, -0.6487213, 0.0], abs=1e-6)


def test_turn_entropy_pulls_the_temperature_to_the_target():
    tempered = torch.tensor([1.0, 3.0, 0.5], requires_grad=True)
    temperature = torch.tensor([0.7, 0.7, 1.2])
    given = replace(scores(torch.zeros(3)), temperature=temperature, tempered_entropy=tempered)
    term = turn_entropy(1.5)(given, make_targets(torch.zeros(3)))
    # turn 0: mean 2, 0.5 * 0.5^2; turn 1: 0.5 * 1^2
    assert term.loss.tolist() == [0.125, 0.125, 0.5]
    assert term.seen["temperature"].tolist() == temperature.tolist()
    assert term.seen["turn_entropy_loss"].tolist() == term.loss.tolist()
    # a turn's loss once: mean - target, shared by its tokens
    assert gradient(term.loss * torch.tensor([0.5, 0.5, 1.0]), tempered) == [0.25, 0.25, -1.0]


def test_k3_is_the_kl_in_expectation_and_exact_near_zero():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3((q / p).log())).sum(), expected, rtol=1e-6, atol=0)
    # x^2 / 2, where exp(x) - 1 - x in fp32 would be off by ten times as much
    torch.testing.assert_close(k3(torch.tensor([1e-4])), torch.tensor([5e-9]), rtol=1e-2, atol=0)
