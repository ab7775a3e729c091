import copy
import math

import pytest
import torch
from torch import nn

from vlm_agents.learn.engine import TorchEngine, lr_share


@pytest.mark.parametrize(
    ("iterations", "warmup", "shares"),
    [
        # floor 0.1: 0.1 + 0.45 * (1 + cos(pi * progress)) at progress 0, 1/4, 1/2, 3/4, 1, and no climbing back
        (5, 0, [1.0, 0.8681981, 0.55, 0.2318019, 0.1, 0.1, 0.1]),
        (5, 2, [1 / 3, 2 / 3, 1.0, 0.55, 0.1, 0.1]),
        (1, 0, [1.0]),
        (3, 9, [0.1, 0.2, 0.3]),  # a run that ends while it warms up
    ],
)
def test_schedule_by_hand(iterations: int, warmup: int, shares: list[float]):
    found = [lr_share(iteration, iterations, warmup, floor=0.1) for iteration in range(len(shares))]
    assert found == pytest.approx(shares, rel=1e-6)


def make_engine(*values: float, weight_decay: float = 0.0, max_grad_norm: float = 1.0):
    parameter = nn.Parameter(torch.tensor(values))
    return parameter, TorchEngine([parameter], weight_decay, max_grad_norm)


def test_each_step_has_the_learning_rate_it_is_told():
    parameter, engine = make_engine(1.0)
    for lr, expected in ((0.1, 0.9), (0.01, 0.89), (0.0, 0.89)):
        engine.backward(parameter.sum())
        engine.step(lr)
        # where the gradient stays the same, a step of Adam is the learning rate against its sign
        assert parameter.item() == pytest.approx(expected, rel=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient():
    parameter, engine = make_engine(1.0, weight_decay=0.5)
    engine.backward(0.0 * parameter.sum())
    engine.step(0.1)
    assert parameter.item() == pytest.approx(0.95)  # 1 - 0.1 * 0.5


def test_step_clips_the_sum_of_gradients_and_tells_the_norm_before():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    engine = TorchEngine(parameters, weight_decay=0.0, max_grad_norm=0.65)
    engine.backward((parameters[0] * torch.tensor([1.0, 0.0])).sum())
    engine.backward((parameters[0] * torch.tensor([2.0, 4.0])).sum() + 12 * parameters[1].sum())
    # the gradient (1 + 2, 4, 12) has norm 13 and is scaled to (0.15, 0.2, 0.6)
    assert engine.step(0.1) == pytest.approx(13.0)
    means = [engine.optimizer.state[parameter]["exp_avg"].tolist() for parameter in parameters]
    # of which Adam's mean takes a tenth
    assert means == [pytest.approx([0.015, 0.02], rel=1e-5), pytest.approx([0.06], rel=1e-5)]
    assert engine.step(0.1) == 0.0  # nothing is left over for the next step


def test_a_gradient_within_the_norm_stays_as_it_is():
    parameter, engine = make_engine(0.0, max_grad_norm=0.5)
    engine.backward(0.2 * parameter.sum())
    assert engine.step(0.1) == pytest.approx(0.2)
    assert engine.optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.02], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_leaves_the_weights_alone(bad: float):
    parameter, engine = make_engine(1.0, 2.0)
    engine.backward((parameter * torch.tensor([bad, 1.0])).sum())
    assert not math.isfinite(engine.step(0.1))
    assert parameter.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype: torch.dtype):
    def train(model: nn.Module, engine: TorchEngine, iterations: range) -> None:
        for iteration in iterations:
            for step in range(3):
                inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * iteration + step), dtype=dtype)
                engine.backward(model(inputs).square().sum())
                engine.step(0.01 / (1 + iteration))

    def make(model: nn.Module) -> TorchEngine:
        return TorchEngine(list(model.parameters()), weight_decay=0.1, max_grad_norm=1.0)

    torch.manual_seed(0)
    whole = nn.Linear(5, 2, dtype=dtype)
    first_half = copy.deepcopy(whole)
    train(whole, make(whole), range(4))
    engine = make(first_half)
    train(first_half, engine, range(2))
    second_half, state = copy.deepcopy(first_half), copy.deepcopy(engine.state_dict())
    resumed = make(second_half)
    resumed.load_state_dict(state)
    train(second_half, resumed, range(2, 4))
    assert torch.equal(second_half.weight, whole.weight)
    assert torch.equal(second_half.bias, whole.bias)
    assert not torch.equal(first_half.weight, whole.weight)


def test_steps_too_small_for_bfloat16_add_up():
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    engine = TorchEngine([parameter], weight_decay=0.0, max_grad_norm=1.0)
    found = []
    for _ in range(3):
        engine.backward(parameter.sum())
        engine.step(1e-3)
        assert parameter.grad is None
        found.append(parameter.item())
    # 0.999, 0.998, 0.997 are 0.26, 0.51, 0.77 of the way from 1 to the next smaller bfloat16
    assert found == [1.0, 1 - 1 / 256, 1 - 1 / 256]
