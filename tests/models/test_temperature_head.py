"""The learned temperature: sampler and losses agree on it, and both of its gradients move it the right way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_agents.config import AlgoConfig, LoraConfig, TemperatureHeadConfig
from vlm_agents.errors import ModelError
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.averages import over_turns
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.losses import clipped, turn_entropy
from vlm_agents.learn.samples import Sample, Targets, to_targets
from vlm_agents.models import Agent
from vlm_agents.models.heads import TemperatureHead
from vlm_agents.models.sampler import HFSampler
from vlm_agents.tensors import Row
from vlm_agents.types import Prompt, Sampling

Load = Callable[..., Agent]
MakeRow = Callable[..., Row]
CONFIG = TemperatureHeadConfig(low=0.5, high=2.0, hidden=16)


def last(head: TemperatureHead) -> torch.nn.Linear:
    layer = head.net[-1]
    assert isinstance(layer, torch.nn.Linear)
    return layer


@pytest.fixture
def tempered(load: Load) -> Agent:
    """An agent whose temperature differs from prompt to prompt."""
    agent = load(temperature_head=CONFIG, temperature=0.8)
    assert agent.temperature_head is not None
    torch.manual_seed(0)
    torch.nn.init.normal_(last(agent.temperature_head).weight, std=0.3)
    return agent


def targets_of(rows: list[Row], advantage: float = 1.0, old: torch.Tensor | None = None) -> Targets:
    samples = []
    for row in rows:
        ones = np.ones(sum(row.reply_lengths), np.float32)
        before = ones if old is None else old.numpy()
        samples.append(Sample(row, before, emphasis=ones, advantages=advantage * ones, returns=ones, old=before))
    return to_targets(samples, over_turns(rows), torch.device("cpu"))


def test_a_fresh_head_says_what_the_model_was_set_to():
    head = TemperatureHead(4, CONFIG, start=0.8)
    torch.testing.assert_close(head(torch.randn(3, 4)), torch.full((3,), 0.8))


def test_the_reference_keeps_the_temperature_it_started_from(load: Load, chats: list[Prompt], make_row: MakeRow):
    agent = load(temperature_head=CONFIG, temperature=0.8, lora=LoraConfig(rank=4))
    plain = load(temperature=0.8)
    rows = [make_row(agent, chat, [30, 31]) for chat in chats]
    assert agent.temperature_head is not None
    torch.nn.init.ones_(last(agent.temperature_head).bias)
    with torch.no_grad():
        expected = plain.score(rows).logprobs
        assert (agent.score(rows).logprobs - expected).abs().max() > 0.1
    with agent.reference():
        torch.testing.assert_close(agent.score(rows).logprobs, expected, rtol=1e-5, atol=1e-5)


def test_the_temperature_stays_within_its_bounds():
    head = TemperatureHead(4, CONFIG, start=0.8)
    torch.nn.init.ones_(last(head).weight)
    extremes = head(torch.tensor([[1e4] * 4, [-1e4] * 4])).tolist()  # GELU lets only one sign through
    assert all(0.5 <= value <= 2.0 for value in extremes)
    assert max(extremes) == pytest.approx(2.0) or min(extremes) == pytest.approx(0.5)


def test_what_is_trained_is_what_was_sampled(tempered: Agent, chats: list[Prompt], make_row: MakeRow):
    """Log-probs and entropies of the sampler are those of `score`, each turn at a temperature of its own."""
    rngs = [np.random.default_rng(index) for index in range(len(chats))]
    replies = HFSampler(tempered).generate(chats, rngs, Sampling(8))
    rows = [make_row(tempered, chat, list(reply.token_ids)) for chat, reply in zip(chats, replies, strict=True)]
    with torch.no_grad():
        scores = tempered.score(rows)
    assert scores.temperature is not None
    assert scores.temperature.std() > 0.01
    sampled = torch.tensor([logprob for reply in replies for logprob in reply.logprobs])
    torch.testing.assert_close(scores.logprobs, sampled, rtol=1e-4, atol=1e-4)
    parts = scores.entropy.split([len(reply.token_ids) for reply in replies])
    assert [float(part.mean()) for part in parts] == pytest.approx([reply.entropy for reply in replies], abs=1e-4)


def test_every_turn_of_a_row_has_its_own(tempered: Agent, chats: list[Prompt], make_row: MakeRow):
    """A row with two replies: the temperature of the second is read where the second begins."""
    both = make_row(tempered, chats[0], [30, 31, 2], [33, 34])
    with torch.no_grad():
        scores = tempered.score([both])
        logits = tempered.logits(tempered.hidden(tempered.collate([both]))[0])
    assert scores.temperature is not None
    assert scores.temperature.unique_consecutive(return_counts=True)[1].tolist() == [3, 2]
    for turn, (start, end) in enumerate(both.spans):
        first = sum(both.reply_lengths[:turn])
        temperature = scores.temperature[first].expand(end - start)
        plain = tempered.log_distribution(logits[start - 1 : end - 1], temperature)
        expected = plain.gather(-1, torch.from_numpy(both.input_ids[start:end])[:, None]).squeeze(-1)
        torch.testing.assert_close(scores.logprobs[first : first + end - start], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likely", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_policy_gradient_sharpens_what_pays(
    tempered: Agent, chats: list[Prompt], make_row: MakeRow, likely: bool, advantage: float
):
    """A likely reply that paid, or an unlikely one that didn't, lowers the temperature; the other two raise it."""
    with torch.no_grad():
        row = make_row(tempered, chats[1], [40])
        states = tempered.hidden(tempered.collate([row]))[0, row.spans[0][0] - 1]
        logits = tempered.logits(states[None]).masked_fill(tempered.banned, -torch.inf)[0]
    token = int(logits.argmax() if likely else logits.masked_fill(tempered.banned, torch.inf).argmin())
    rows = [make_row(tempered, chats[1], [token])]
    scores = tempered.score(rows)
    assert scores.temperature is not None
    loss = clipped(0.2, 0.2)(scores, targets_of(rows, advantage, old=scores.logprobs.detach())).loss
    (slope,) = torch.autograd.grad(loss.sum(), scores.temperature)
    assert (float(slope) > 0) == (likely == (advantage > 0))  # descent goes against the slope


def test_the_entropy_target_moves_the_head_alone(tempered: Agent, chats: list[Prompt], make_row: MakeRow):
    rows = [make_row(tempered, chat, [30, 31, 2]) for chat in chats]
    targets = targets_of(rows)

    def spread() -> float:
        """Mean over turns of the mean over their tokens."""
        entropies = tempered.score(rows).tempered_entropy
        assert entropies is not None
        return entropies.view(len(rows), 3).mean(1).mean().item()

    before = spread()
    target = before - 0.1

    def descend() -> None:
        (targets.weight * turn_entropy(target)(tempered.score(rows), targets).loss).sum().backward()

    descend()
    moved = [name for name, parameter in tempered.named_parameters() if parameter.grad is not None]
    assert moved
    assert all(name.startswith("temperature_head.") for name in moved)
    assert tempered.temperature_head is not None
    optimizer = torch.optim.Adam(tempered.temperature_head.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        descend()
        optimizer.step()
    assert abs(spread() - target) < 0.03 < before - target


def test_gradients_are_finite_though_banned_tokens_have_no_probability(
    tempered: Agent, chats: list[Prompt], make_row: MakeRow
):
    scores = tempered.score([make_row(tempered, chats[0], [30, 2])])
    assert scores.tempered_entropy is not None
    (scores.logprobs.sum() + scores.entropy.sum() + scores.tempered_entropy.sum()).backward()
    gradients = [parameter.grad for parameter in tempered.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_head_is_saved_beside_the_weights(tempered: Agent, load: Load, tmp_path: Path):
    tempered.save(tmp_path)
    again = load(tmp_path, temperature_head=CONFIG, temperature=0.8)
    prompt = torch.randn(2, 128)
    torch.testing.assert_close(again.temperatures(prompt), tempered.temperatures(prompt), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"temperature_head.*its shapes differ"):
        load(tmp_path, temperature_head=TemperatureHeadConfig(hidden=8))
    with pytest.raises(ModelError, match=r"temperature_head.safetensors would go unused: add model/temperature_head"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"set model.temperature_head.low=0.5 model.temperature_head.high=2"):
        load(tmp_path, temperature_head=TemperatureHeadConfig(low=0.5, high=1.5, hidden=16))


def test_its_learning_rate_is_that_of_the_heads(tempered: Agent):
    assert tempered.temperature_head is not None
    roles = tempered.parameters_by_role()
    assert {id(parameter) for parameter in tempered.temperature_head.parameters()} == set(map(id, roles["temperature"]))
    algo = AlgoConfig(name="ppo", lr=0.1, value_lr=0.2, value_warmup=1, min_lr_ratio=1.0)
    learner, rates = (
        Learner(tempered, tempered.renderer, make_algorithm(algo, 8, tempered=True), algo, 9, Shares(1000)),
        [],
    )
    for learner.iteration in range(2):
        rates.append({role: learner.rate(role) for role in learner.engines})
    # it is part of the policy: it waits for the critic too
    assert rates == [{"policy": 0, "temperature": 0}, {"policy": 0.1, "temperature": 0.2}]
    assert learner.critic is not None
    assert learner.critic.rate(0) == 0.2
    assert AlgoConfig(name="ppo").turn_entropy_coef == 0
