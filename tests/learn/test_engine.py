import copy

import pytest
import torch
from torch import nn

from vlm_agents.config import AlgoConfig
from vlm_agents.learn.engine import TorchEngine, lr_share

PLAIN = {"lr": 0.1, "value_lr": 0.01, "value_warmup": 0}


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


def make_engine(policy: list[float], value: list[float], iterations: int = 3, **algo: float):
    roles = {
        "policy": [nn.Parameter(torch.tensor(policy))] if policy else [],
        "value": [nn.Parameter(torch.tensor(value))] if value else [],
    }
    return roles, TorchEngine(roles, AlgoConfig(name="ppo", **PLAIN | algo), iterations)  # type: ignore[arg-type]


def test_each_role_has_its_learning_rate_and_iterations_move_both():
    roles, engine = make_engine([1.0], [1.0], iterations=2)
    engine.backward(roles["policy"][0].sum() + roles["value"][0].sum())
    engine.step()
    # the first step of Adam is the learning rate against the gradient's sign
    assert roles["policy"][0].item() == pytest.approx(0.9, rel=1e-6)
    assert roles["value"][0].item() == pytest.approx(0.99, rel=1e-6)
    assert engine.learning_rate == 0.1  # whatever the number of steps
    engine.end_iteration()
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.01, 0.001])


def test_weight_decay_is_decoupled_from_the_gradient():
    roles, engine = make_engine([1.0], [], weight_decay=0.5)
    engine.backward(0.0 * roles["policy"][0].sum())
    engine.step()
    assert roles["policy"][0].item() == pytest.approx(0.95)  # 1 - 0.1 * 0.5


def test_step_clips_each_role_apart_and_tells_the_norms_before():
    roles, engine = make_engine([0.0, 0.0], [0.0], max_grad_norm=0.5)
    engine.backward((roles["policy"][0] * torch.tensor([1.0, 0.0])).sum())
    engine.backward((roles["policy"][0] * torch.tensor([2.0, 4.0])).sum() + 0.2 * roles["value"][0].sum())
    # the policy's gradient (1 + 2, 4) has norm 5 and is scaled to (0.3, 0.4); the value's is small enough as it is
    assert engine.step() == {"policy": pytest.approx(5.0), "value": pytest.approx(0.2)}
    means = [engine.optimizer.state[role[0]]["exp_avg"].tolist() for role in roles.values()]
    # of which Adam's mean takes a tenth
    assert means == [pytest.approx([0.03, 0.04], rel=1e-5), pytest.approx([0.02], rel=1e-5)]
    assert engine.step() == {"policy": 0.0, "value": 0.0}  # nothing is left over for the next step


def test_the_schedule_of_the_policy_begins_after_the_critics_warm_up():
    _, engine = make_engine([1.0], [1.0], iterations=4, value_warmup=1, value_lr=1.0)
    rates, alone = [], []
    for _ in range(4):
        rates.append([group["lr"] for group in engine.optimizer.param_groups])
        alone.append(engine.critic_only)
        engine.end_iteration()
    assert alone == [True, False, False, False]
    # 0.1 + 0.45 * (1 + cos(pi * progress)), the policy's of 0, 1/2, 1 in iterations 2 to 4, the critic's of 0 to 3/3
    assert rates == [pytest.approx(both) for both in ([0.0, 1.0], [0.1, 0.775], [0.055, 0.325], [0.01, 0.1])]


def test_the_only_iteration_is_no_warm_up():
    _, engine = make_engine([1.0], [1.0], iterations=1, value_warmup=1)
    assert not engine.critic_only
    assert engine.learning_rate == 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_leaves_the_weights_alone(bad: float):
    roles, engine = make_engine([1.0, 2.0], [])
    engine.backward((roles["policy"][0] * torch.tensor([bad, 1.0])).sum())
    assert not torch.tensor(engine.step()["policy"]).isfinite()
    assert roles["policy"][0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("policy", "value"), [([1.0], []), ([], [1.0])])
def test_a_role_may_be_empty(policy: list[float], value: list[float]):
    roles, engine = make_engine(policy, value)
    engine.backward(sum(parameter.sum() for role in roles.values() for parameter in role))  # type: ignore[arg-type]
    assert sorted(engine.step().values()) == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_continues_bit_for_bit(dtype: torch.dtype):
    def train(model: nn.Module, engine: TorchEngine, iterations: range) -> None:
        for iteration in iterations:
            for step in range(3):
                inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * iteration + step), dtype=dtype)
                engine.backward(model(inputs).square().sum())
                engine.step()
            engine.end_iteration()

    def make(model: nn.Module) -> TorchEngine:
        algo = AlgoConfig(name="ppo", lr=0.01, warmup_updates=1, weight_decay=0.1, value_warmup=0)
        return TorchEngine({"policy": list(model.parameters())}, algo, iterations=4)

    torch.manual_seed(0)
    whole = nn.Linear(5, 2, dtype=dtype)
    first_half = copy.deepcopy(whole)
    train(whole, make(whole), range(4))
    engine = make(first_half)
    train(first_half, engine, range(2))
    second_half, state = copy.deepcopy(first_half), copy.deepcopy(engine.state_dict())
    resumed = make(second_half)
    resumed.load_state_dict(state)
    assert resumed.learning_rate == engine.learning_rate
    train(second_half, resumed, range(2, 4))
    assert torch.equal(second_half.weight, whole.weight)
    assert torch.equal(second_half.bias, whole.bias)
    assert not torch.equal(first_half.weight, whole.weight)


def test_steps_too_small_for_bfloat16_add_up():
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    engine = TorchEngine({"policy": [parameter]}, AlgoConfig("ppo", lr=1e-3, value_warmup=0), 9)
    found = []
    for _ in range(3):
        engine.backward(parameter.sum())
        engine.step()
        assert parameter.grad is None
        found.append(parameter.item())
    # 0.999, 0.998, 0.997 are 0.26, 0.51, 0.77 of the way from 1 to the next smaller bfloat16
    assert found == [1.0, 1 - 1 / 256, 1 - 1 / 256]
