"""Every loss is checked for its value and for the direction of its gradient: a flipped sign fails both."""

import pytest
import torch
from torch import Tensor

from vlm_agents.learn.losses import k3, ppo_policy_loss, reference_kl, turn_mean, turn_sum, value_loss

# two turns: the first has tokens 0 and 1, the second token 2
TURN_OF_TOKEN = torch.tensor([0, 0, 1])


def gradient(loss: Tensor, of: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found.tolist()


def test_turn_sum_and_mean():
    per_token = torch.tensor([1.0, 3.0, 5.0])
    assert turn_sum(per_token, TURN_OF_TOKEN, 2).tolist() == [4.0, 5.0]
    assert turn_mean(per_token, TURN_OF_TOKEN, 2).tolist() == [2.0, 5.0]


def test_policy_loss_by_hand():
    found = ppo_policy_loss(
        logprobs=torch.tensor([-1.0, -0.5, -2.0]),
        old_logprobs=torch.tensor([-1.4, -0.6, -1.9]),
        token_weight=torch.tensor([0.5, 1.0, 1.0]),
        turn_of_token=TURN_OF_TOKEN,
        advantages=torch.tensor([2.0, -1.0]),
        clip=0.2,
    )
    # turn 0: log ratio 0.5*0.4 + 0.1 = 0.3, ratio 1.349859, clipped to 1.2, times 2, negated
    # turn 1: log ratio -0.1, ratio 0.904837, inside the clip range, times -1, negated
    torch.testing.assert_close(found.loss, torch.tensor([-2.4, 0.904837]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.ratio, torch.tensor([1.349859, 0.904837]), rtol=1e-6, atol=0)
    # of the tokens unweighted, exp(d) - 1 - d: d is 0.5 and -0.1
    torch.testing.assert_close(found.approx_kl, torch.tensor([0.148721, 0.004837]), rtol=1e-4, atol=0)
    assert found.clipped.tolist() == [1.0, 0.0]


def test_policy_loss_raises_the_probability_of_good_turns_by_token_weight():
    logprobs = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    weight, advantages = torch.tensor([0.5, 1.0, 1.0]), torch.tensor([2.0, -3.0])
    loss = ppo_policy_loss(logprobs, logprobs.detach(), weight, TURN_OF_TOKEN, advantages, clip=0.2).loss
    # at ratio 1: -advantage * weight; negative, so descent raises the log-probs of the turn with the good advantage
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
def test_clip_kills_the_gradient_exactly_where_it_must(ratio: float, advantage: float, slope: float):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    zero = torch.zeros(1)
    found = ppo_policy_loss(logprobs, zero, zero + 1, zero.long(), torch.tensor([advantage]), clip=0.2)
    # d(-ratio * advantage) / d log-prob = -ratio * advantage
    assert gradient(found.loss, logprobs) == pytest.approx([slope])
    assert found.clipped.tolist() == [float(abs(ratio - 1) > 0.2)]


def test_value_loss_moves_values_to_returns():
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([3.0, 4.0]))
    # 0.5 * 2^2 and 0.5 * 1^2; gradient value - return
    assert loss.tolist() == [2.0, 0.5]
    assert gradient(loss, values) == [-2.0, 1.0]


def test_reference_kl_pulls_the_policy_to_the_reference():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.5, -0.5])
    loss = reference_kl(logprobs, reference, TURN_OF_TOKEN, 2)
    # turn 0: mean of exp(-0.5) - 1 + 0.5 = 0.106531 and exp(0.5) - 1 - 0.5 = 0.148721; turn 1 agrees with the reference
    torch.testing.assert_close(loss, torch.tensor([0.127626, 0.0]), rtol=1e-5, atol=1e-7)
    # (1 - exp(-0.5)) / 2 above the reference, (1 - exp(0.5)) / 2 below it
    assert gradient(loss, logprobs) == pytest.approx([0.1967347, -0.3243606, 0.0], abs=1e-6)


def test_k3_is_the_kl_in_expectation_and_exact_near_zero():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3((q / p).log())).sum(), expected, rtol=1e-6, atol=0)
    # x^2 / 2, where exp(x) - 1 - x in fp32 would be off by ten times as much
    torch.testing.assert_close(k3(torch.tensor([1e-4])), torch.tensor([5e-9]), rtol=1e-2, atol=0)
