from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_agents.learn.critic import Critic
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.samples import Sample, Targets, to_targets
from vlm_agents.tensors import Scores

# three turns of 2, 1 and 3 tokens, each state [1] the number of its token
STATES = torch.arange(6.0)[:, None]
RETURNS = torch.tensor([1.0, 1.0, 5.0, 9.0, 9.0, 9.0])


@pytest.fixture
def targets() -> Targets:
    turn, nothing = torch.tensor([0, 0, 1, 2, 2, 2]), torch.zeros(6)
    row, first = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 2, 3])
    return Targets(nothing, nothing, nothing, nothing, RETURNS, None, nothing, turn, row, first)


class Steps:
    """An engine that keeps the losses that it is given, and moves nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def step(self, lr: float) -> float:
        return lr


def critic_of(
    value: Callable[[Tensor], Tensor], epochs: int = 1, turns: int = 8, warmup: int = 0, by_token: bool = False
) -> Critic:
    return Critic(value, cast(TorchEngine, Steps()), lambda _: 0.5, 1.0, epochs, turns, warmup, by_token)


def scores(states: Tensor = STATES) -> Scores:
    return Scores(torch.zeros(6), torch.zeros(6), states)


def twice(states: Tensor) -> Tensor:
    return 2 * states.squeeze(-1)


def test_it_reads_the_state_before_each_turn(targets: Targets):
    read = critic_of(twice).read(scores(STATES.clone().requires_grad_()), targets)
    # the first row holds two turns, the second one
    assert [one.states.tolist() for one in read] == [[[0.0], [2.0]], [[3.0]]]
    assert [one.returns.tolist() for one in read] == [[1.0, 5.0], [9.0]]
    assert [one.turns for one in read] == [2, 1]
    assert not any(one.states.requires_grad for one in read)


def test_its_term_is_a_turns_squared_error_and_reaches_whom_the_head_lets_it(targets: Targets):
    states = STATES.clone().requires_grad_()
    term = critic_of(twice).term(scores(states), targets)
    # values 0, 4, 6: 0.5 * 1^2, 0.5 * 1^2, 0.5 * 3^2, for each token of the turn
    assert term.loss.tolist() == [0.5, 0.5, 0.5, 4.5, 4.5, 4.5]
    assert list(term.seen) == ["value_loss"]
    assert term.seen["value_loss"].tolist() == term.loss.tolist()
    (term.loss * torch.tensor([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3])).sum().backward()
    assert states.grad is not None
    # 2 * (value - return) where it was read, nothing elsewhere
    torch.testing.assert_close(states.grad[:, 0], torch.tensor([-2.0, 0, -2, -6, 0, 0]))


def test_it_warms_up_in_its_first_iterations():
    critic = critic_of(twice, warmup=2)
    assert [critic.warming(iteration) for iteration in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(("turns", "sizes"), [(100, [10]), (5, [5, 5]), (3, [4, 3, 3])])
def test_each_epoch_goes_over_each_turn_once_in_even_parts(
    tiny_agent: Any,
    make_samples: Callable[..., list[Sample]],
    turns: int,
    sizes: list[int],
):
    agent, seen = tiny_agent(), []

    def value(states: Tensor) -> Tensor:
        seen.append(states.tolist())
        return agent.value(states)

    critic = critic_of(value, 2, turns)
    read = []
    for part in (make_samples(agent, range(4, 10)), make_samples(agent, range(10, 14))):
        rows = [sample.row for sample in part]
        targets = to_targets(part, [sample.old for sample in part], torch.device("cpu"))
        read += critic.read(agent.score(rows), targets)
    norms = list(critic.fit(read, 3, np.random.default_rng(0)))
    losses = cast(Steps, critic.engine).losses
    assert norms == [0.5] * len(losses)
    everything = sorted(state for part in read for state in part.states.tolist())
    assert [len(part) for part in seen] == 2 * sizes
    epochs = [[state for part in seen[start : start + len(sizes)] for state in part] for start in (0, len(sizes))]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 2
    assert epochs[0] != epochs[1]  # in another order
    errors = torch.cat([agent.value(part.states) - part.returns for part in read])
    assert sum(loss * size for loss, size in zip(losses, 2 * sizes, strict=True)) / 20 == pytest.approx(
        (0.5 * errors.square().mean()).item()
    )


def test_without_epochs_it_takes_no_step(targets: Targets):
    critic = critic_of(twice, epochs=0)
    assert list(critic.fit(critic.read(scores(), targets), 0, np.random.default_rng(0))) == []


def test_by_token_it_reads_the_state_before_each_token(targets: Targets):
    critic = critic_of(twice, by_token=True)
    read = critic.read(scores(), targets)
    assert [one.states.squeeze(-1).tolist() for one in read] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert torch.cat([one.returns for one in read]).tolist() == RETURNS.tolist()
    assert [one.turns for one in read] == [2, 1]
    # 0.5 * (0 - 1)^2, (2 - 1)^2, (4 - 5)^2, (6 - 9)^2, (8 - 9)^2, (10 - 9)^2
    assert critic.term(scores(), targets).loss.tolist() == [0.5, 0.5, 0.5, 4.5, 0.5, 0.5]
