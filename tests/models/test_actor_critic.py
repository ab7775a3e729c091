from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_agents.config import HardwareConfig, ModelConfig, ValueHeadConfig
from vlm_agents.errors import ModelError
from vlm_agents.models import Agent, load_agent
from vlm_agents.models.actor_critic import entropy_of
from vlm_agents.tensors import Row, Scores
from vlm_agents.types import Prompt

Load = Callable[..., Agent]
MakeRow = Callable[..., Row]
ValuesOf = Callable[..., Tensor]
REPLIES = [[30, 31, 32, 2], [40], [50, 51, 2], [60, 61, 62, 63, 64, 2], [70, 71]]


@pytest.fixture(scope="module")
def rows(agent: Agent, chats: list[Prompt], make_row: MakeRow) -> list[Row]:
    """Mixed lengths and pictures; the first and the fourth hold two replies."""
    built = [make_row(agent, chat, reply) for chat, reply in zip(chats, REPLIES, strict=True)]
    built[0] = make_row(agent, chats[0], REPLIES[0], [33, 34])
    built[3] = make_row(agent, chats[3], REPLIES[3], [65, 2])
    return built


def plain_scores(agent: Agent, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and values of one row out of transformers' own forward pass over all of it."""
    ids = torch.from_numpy(row.input_ids)[None]
    pixels = agent.image_processor(images=[one.image for one in row.images], return_tensors="pt") if row.images else {}
    kinds = (ids == agent.family.image_token_id).int()
    output = agent.model(input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True, **pixels)
    logits = output.logits[0] / agent.temperature
    logits[:, agent.banned] = -torch.inf
    logprobs = logits.log_softmax(-1)
    before = [place - 1 for start, end in row.spans for place in range(start, end)]
    entropies = torch.distributions.Categorical(logits=logits[before][:, ~agent.banned]).entropy()
    starts = [start - 1 for start, _ in row.spans]
    values = agent.value_head(output.hidden_states[-1][0, starts])
    return logprobs[before, ids[0, [place + 1 for place in before]]], entropies, values


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def score(agent: Agent, rows: Sequence[Row]) -> Scores:
    with torch.no_grad():
        return agent.score(rows)


def nothing_in_common(row: Row) -> Row:
    """A row of its own, as long as that one, of which nothing is scored."""
    return Row("other", np.full(len(row), 9), (), ())


# ---- scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_a_plain_forward_pass(load: Load, rows: list[Row], values_of: ValuesOf, temperature: float):
    agent = load(temperature=temperature)
    with torch.no_grad():
        plain = [plain_scores(agent, row) for row in rows]
    scores = score(agent, rows)
    values = values_of(agent, rows, scores)
    for one, parts in zip((scores.logprobs, scores.entropy, values), zip(*plain, strict=True), strict=True):
        close(one, torch.cat(parts))
    assert scores.logprobs.shape == scores.entropy.shape == (6 + 1 + 3 + 8 + 2,)
    assert scores.states.shape == (6 + 1 + 3 + 8 + 2, 128)
    assert values.shape == (7,)  # two of the rows hold two replies
    assert values.unique().shape == (7,)


def test_scores_depend_on_the_picture(agent: Agent, rows: list[Row], chats: list[Prompt], make_row: MakeRow):
    other = make_row(
        agent, (chats[0][0], replace(chats[0][1], parts=(*chats[3][1].images, chats[0][1].text))), REPLIES[0]
    )
    assert (score(agent, [other]).logprobs - score(agent, rows[:1]).logprobs[:4]).abs().max() > 1e-2


def test_neither_padding_nor_the_rest_of_the_batch_matters(agent: Agent, rows: list[Row]):
    together, backwards = score(agent, rows), score(agent, rows[::-1])
    alone = [score(agent, [row]) for row in rows]
    for name in ("logprobs", "entropy", "states"):
        parts = [getattr(scores, name) for scores in alone]
        close(getattr(together, name), torch.cat(parts))
        close(getattr(backwards, name), torch.cat(parts[::-1]))


def test_a_shared_prefix_changes_neither_scores_nor_gradients(load: Load, rows: list[Row], values_of: ValuesOf):
    agent = load(value_head=ValueHeadConfig(stop_gradient=False))
    apart = [*rows, nothing_in_common(max(rows, key=len))]
    assert agent.collate(rows).shared > 20
    assert agent.collate(apart).shared == 0
    found = []
    for batch in (rows, apart):
        agent.zero_grad()
        scores = agent.score(batch)
        (scores.logprobs.sum() + scores.entropy.sum() + values_of(agent, batch, scores).sum()).backward()
        parameters = dict(agent.named_parameters())
        gradients = {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
        found.append((scores, gradients))
    (scores, gradients), (plain, plain_gradients) = found
    for name in ("logprobs", "entropy", "states"):
        close(getattr(scores, name), getattr(plain, name))
    close(values_of(agent, rows, scores), values_of(agent, rows, plain))
    assert gradients.keys() == plain_gradients.keys() == dict(agent.named_parameters()).keys()
    for name, gradient in gradients.items():
        # relative to the parameter's largest gradient: sums in another order
        close(gradient / plain_gradients[name].abs().max(), plain_gradients[name] / plain_gradients[name].abs().max())


def test_the_shared_prefix_ends_before_pictures_and_leaves_each_row_a_token(
    agent: Agent, chats: list[Prompt], make_row: MakeRow
):
    tokens = agent.collate([make_row(agent, chats[0], [30]), make_row(agent, chats[0], [31, 32])])
    assert tokens.shared == int((tokens.input_ids[0] == agent.family.image_token_id).long().argmax())
    words = agent.collate([make_row(agent, chats[1], [30]), make_row(agent, chats[1], [31, 32])])
    prompt_length = int(words.reply_mask[0].long().argmax())
    assert words.shared == prompt_length - 1
    assert agent.collate([make_row(agent, chats[1], [30])]).shared == 0  # a row alone
    long = 10 * words.shared
    assert agent.collate([make_row(agent, chats[1], [30]), make_row(agent, chats[1], [31] * long)]).shared == 0


# ---- banned tokens ---------------------------------------------------------------------------------------------------
def test_reserved_tokens_and_spare_rows_are_banned_and_nothing_else(agent: Agent):
    vocabulary = agent.tokenizer.get_vocab()
    spare = set(range(len(agent.tokenizer), len(agent.banned)))
    assert len(spare) == 16
    reserved = ["endoftext", "im_start", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    assert set(agent.banned.nonzero().squeeze().tolist()) == spare | {vocabulary[f"<|{name}|>"] for name in reserved}
    assert not agent.banned[vocabulary["<|im_end|>"]]


def test_the_gradient_of_an_entropy_is_its_slope():
    logits = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    banned = torch.arange(7) == 2
    assert torch.autograd.gradcheck(
        lambda logits: entropy_of(logits.masked_fill(banned, -torch.inf).log_softmax(-1)), (logits,)
    )


def test_of_all_numbers_over_the_vocabulary_the_log_probs_alone_are_kept(agent: Agent, rows: list[Row]):
    """For the gradients of log-probs and entropies; the mask of banned tokens is as long as one row of them."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = agent.score(rows)
    sizes = [len(scores.logprobs), len(agent.banned)]
    wide = [tensor for tensor in kept.values() if list(tensor.shape) == sizes]
    assert len(wide) == 1


def test_banned_tokens_have_no_probability_and_harm_no_gradient(load: Load, rows: list[Row]):
    agent = load()
    hidden = torch.randn(3, 128, requires_grad=True)
    distribution = agent.log_distribution(agent.logits(hidden), torch.ones(3))
    assert (distribution.exp()[:, agent.banned] == 0).all()
    close(distribution.exp().sum(-1), torch.ones(3))
    agent.score(rows).entropy.sum().backward()
    gradients = [parameter.grad for parameter in agent.model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


# ---- the critic ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [True, False])
def test_the_critic_moves_the_backbone_only_if_told_to(load: Load, rows: list[Row], values_of: ValuesOf, stop: bool):
    agent = load(value_head=ValueHeadConfig(stop_gradient=stop))
    values_of(agent, rows, agent.score(rows)).sum().backward()
    moved = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in agent.model.parameters()]
    assert any(moved) is not stop
    assert all(parameter.grad is not None for parameter in agent.parameters_by_role()["value"])


def test_a_fresh_critic_expects_nothing(tiny_folder: Path, rows: list[Row], values_of: ValuesOf):
    fresh = load_agent(ModelConfig(name="tiny", path=str(tiny_folder)), HardwareConfig(name="cpu"))
    assert values_of(fresh, rows, score(fresh, rows)).tolist() == [0.0] * 7


# ---- a frozen vision part --------------------------------------------------------------------------------------------
def features_of(agent: Agent, rows: Sequence[Row]) -> Tensor:
    features = agent.images.features(agent.collate(rows).images)
    assert features is not None
    return features


def test_frozen_pictures_are_encoded_once_until_cleared(load: Load, rows: list[Row], values_of: ValuesOf):
    agent, frozen = load(), load(freeze_vision=True)
    assert not agent.images.frozen
    assert frozen.images.frozen
    features = features_of(frozen, rows)
    # 84x56, twice; 56x56 and 100x75; 75x100: tokens of a merged 28x28
    assert features.shape == (6 + 4 + 12 + 6 + 12, 128)
    before, after = score(agent, rows), score(frozen, rows)
    close(after.logprobs, before.logprobs)
    close(values_of(frozen, rows, after), values_of(agent, rows, before))
    with torch.no_grad():
        frozen.model.model.visual.merger.ln_q.weight.mul_(2)
    assert torch.equal(features_of(frozen, rows), features)
    frozen.images.clear()
    assert not torch.equal(features_of(frozen, rows), features)


def test_what_doesnt_fit_is_encoded_anew(load: Load, rows: list[Row], monkeypatch: pytest.MonkeyPatch):
    agent = load(freeze_vision=True)
    monkeypatch.setattr("vlm_agents.models.images.KEEP_BYTES", 12 * 128 * 4)  # fp32 features of the last picture
    before = features_of(agent, rows)
    with torch.no_grad():
        agent.model.model.visual.merger.ln_q.weight.mul_(2)
    after = features_of(agent, rows)
    assert (before != after).any(-1).tolist() == [True] * 28 + [False] * 12


def test_training_with_a_frozen_vision_part_moves_the_language_part_alone(load: Load, rows: list[Row]):
    agent = load(freeze_vision=True)
    before = {name: parameter.clone() for name, parameter in agent.model.named_parameters()}
    optimizer = torch.optim.SGD(agent.parameters_by_role()["policy"], lr=0.1)
    agent.score(rows).logprobs.mean().backward()
    optimizer.step()
    for name, parameter in agent.model.named_parameters():
        assert torch.equal(parameter, before[name]) is (agent.family.part_of(name) != "language"), name


# ---- reference -------------------------------------------------------------------------------------------------------
def test_without_an_adapter_there_is_no_reference(agent: Agent, rows: list[Row]):
    with pytest.raises(ModelError, match=r"needs model\.lora"), agent.reference():
        agent.score(rows)
