"""The learned temperature: sampler and losses agree on it, and both of its gradients move it the right way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_agents.config import AlgoConfig, LoraConfig, TemperatureHeadConfig
from vlm_agents.errors import ModelError
from vlm_agents.learn.engine import TorchEngine
from vlm_agents.learn.losses import ppo_policy_loss, turn_entropy_loss
from vlm_agents.models import Agent
from vlm_agents.models.actor_critic import TemperatureHead
from vlm_agents.models.sampler import Sampler
from vlm_agents.tensors import Row, Scores
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


def score(agent: Agent, rows: list[Row]) -> Scores:
    return agent.score(agent.renderer.collate(rows))


def test_a_fresh_head_says_what_the_model_was_set_to():
    head = TemperatureHead(4, CONFIG, start=0.8)
    torch.testing.assert_close(head(torch.randn(3, 4)), torch.full((3,), 0.8))


def test_the_reference_keeps_the_temperature_it_started_from(load: Load, chats: list[Prompt], make_row: MakeRow):
    agent = load(temperature_head=CONFIG, temperature=0.8, lora=LoraConfig(rank=4))
    plain = load(temperature=0.8)
    tokens = agent.renderer.collate([make_row(agent, chat, [30, 31]) for chat in chats])
    assert agent.temperature_head is not None
    torch.nn.init.ones_(last(agent.temperature_head).bias)
    with torch.no_grad():
        expected = plain.score(tokens).logprobs
        assert (agent.score(tokens).logprobs - expected).abs().max() > 0.1
    torch.testing.assert_close(agent.reference_logprobs(tokens), expected, rtol=1e-5, atol=1e-5)


def test_the_temperature_stays_within_its_bounds():
    head = TemperatureHead(4, CONFIG, start=0.8)
    torch.nn.init.ones_(last(head).weight)
    extremes = head(torch.tensor([[1e4] * 4, [-1e4] * 4])).tolist()  # GELU lets only one sign through
    assert all(0.5 <= value <= 2.0 for value in extremes)
    assert max(extremes) == pytest.approx(2.0) or min(extremes) == pytest.approx(0.5)


def test_what_is_trained_is_what_was_sampled(tempered: Agent, chats: list[Prompt], make_row: MakeRow):
    """Log-probs and entropies of the sampler are those of `score`, each turn at a temperature of its own."""
    rngs = [np.random.default_rng(index) for index in range(len(chats))]
    replies = Sampler(tempered).generate(chats, rngs, Sampling(8))
    rows = [make_row(tempered, chat, list(reply.token_ids)) for chat, reply in zip(chats, replies, strict=True)]
    with torch.no_grad():
        scores = score(tempered, rows)
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
        scores = score(tempered, [both])
        logits = tempered.logits(tempered.hidden(tempered.renderer.collate([both]))[0])
    assert scores.temperature is not None
    assert len(scores.temperature) == 2
    for turn, (start, end) in enumerate(both.spans):
        plain = tempered.log_distribution(logits[start - 1 : end - 1], scores.temperature[[turn] * (end - start)])
        expected = plain.gather(-1, torch.from_numpy(both.input_ids[start:end])[:, None]).squeeze(-1)
        first = sum(e - s for s, e in both.spans[:turn])
        torch.testing.assert_close(scores.logprobs[first : first + end - start], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likely", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_policy_gradient_sharpens_what_pays(
    tempered: Agent, chats: list[Prompt], make_row: MakeRow, likely: bool, advantage: float
):
    """A likely reply that paid, or an unlikely one that didn't, lowers the temperature; the other two raise it."""
    with torch.no_grad():
        row = make_row(tempered, chats[1], [40])
        states = tempered.hidden(tempered.renderer.collate([row]))[0, row.spans[0][0] - 1]
        logits = tempered.logits(states[None]).masked_fill(tempered.banned, -torch.inf)[0]
    token = int(logits.argmax() if likely else logits.masked_fill(tempered.banned, torch.inf).argmin())
    scores = score(tempered, [make_row(tempered, chats[1], [token])])
    assert scores.temperature is not None
    weights, turn = torch.ones(1), torch.zeros(1, dtype=torch.long)
    loss = ppo_policy_loss(scores.logprobs, scores.logprobs.detach(), weights, turn, torch.tensor([advantage]), 0.2)
    (slope,) = torch.autograd.grad(loss.loss.sum(), scores.temperature)
    assert (float(slope) > 0) == (likely == (advantage > 0))  # descent goes against the slope


def test_the_entropy_target_moves_the_head_alone(tempered: Agent, chats: list[Prompt], make_row: MakeRow):
    rows = [make_row(tempered, chat, [30, 31, 2]) for chat in chats]
    turn_of_token = torch.arange(len(rows)).repeat_interleave(3)

    def spread() -> torch.Tensor:
        entropies = score(tempered, rows).tempered_entropy
        assert entropies is not None
        return entropies.new_zeros(len(rows)).index_add(0, turn_of_token, entropies) / 3

    before = spread().mean().item()
    target = before - 0.1
    turn_entropy_loss(spread(), target).sum().backward()
    moved = [name for name, parameter in tempered.named_parameters() if parameter.grad is not None]
    assert moved
    assert all(name.startswith("temperature_head.") for name in moved)
    assert tempered.temperature_head is not None
    optimizer = torch.optim.Adam(tempered.temperature_head.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        turn_entropy_loss(spread(), target).sum().backward()
        optimizer.step()
    assert abs(spread().mean().item() - target) < 0.03 < before - target


def test_gradients_are_finite_though_banned_tokens_have_no_probability(
    tempered: Agent, chats: list[Prompt], make_row: MakeRow
):
    scores = score(tempered, [make_row(tempered, chats[0], [30, 2])])
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
    engine = TorchEngine(roles, AlgoConfig(name="ppo", lr=0.1, value_lr=0.2, value_warmup=1, min_lr_ratio=1.0), 9)
    rates = []
    for _ in range(2):
        rates.append(dict(zip(roles, [group["lr"] for group in engine.optimizer.param_groups], strict=True)))
        engine.end_iteration()
    # it is part of the policy: it waits for the critic too
    assert rates == [{"policy": 0, "temperature": 0, "value": 0.2}, {"policy": 0.1, "temperature": 0.2, "value": 0.2}]
    assert AlgoConfig(name="ppo").turn_entropy_coef == 0
