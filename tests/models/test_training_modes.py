"""Each family in each way of training: what learns is what was asked for, and what is trained is what was sampled."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from vlm_agents.config import AlgoConfig, HardwareConfig, LoraConfig, ModelConfig, TrainableConfig, conf_dir
from vlm_agents.errors import ModelError
from vlm_agents.learn.algorithm import make_algorithm
from vlm_agents.learn.batches import Shares
from vlm_agents.learn.learner import Learner
from vlm_agents.learn.samples import Sample
from vlm_agents.models import Agent, HFSampler, load_agent
from vlm_agents.tensors import Row, Scores
from vlm_agents.types import Prompt, Reply, Sampling

TWINS = ["tiny", "tiny_qwen2_vl", "tiny_qwen3_vl", "tiny_llava"]
LORA = LoraConfig(rank=4, alpha=8, dropout=0.5)
MODES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA, "quantize": "nf4"}}
PARTS = ["vision", "projector", "language"]
ALGO = AlgoConfig("ppo", lr=1e-3, value_lr=1e-2, max_mismatch_kl=None)
ROOM = 12  # tokens a reply

RowOf = Callable[[Prompt, Reply], Row]
MakeRow = Callable[..., Row]
Play = Callable[[Agent], list[Sample]]

twins = pytest.mark.parametrize("name", TWINS)
modes = pytest.mark.parametrize("mode", MODES)


def load(name: str, mode: str, freeze_vision: bool = False, init: Path | None = None, **settings: Any) -> Agent:
    """A twin as conf/model has it; a fresh adapter and value head get something to say, which a loaded one has."""
    said = yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text())
    del said["defaults"]
    hardware = HardwareConfig("cpu", dtype=settings.pop("dtype", "float32"))
    settings = {"train": TrainableConfig(not freeze_vision, not freeze_vision), **settings}
    cfg = ModelConfig(**said, **MODES[mode], **settings)
    torch.manual_seed(1)
    agent = load_agent(cfg, hardware, str(init) if init else None)
    for parameter_name, parameter in agent.named_parameters():
        if init is None and ("lora_B" in parameter_name or "value_head" in parameter_name):
            nn.init.normal_(parameter, std=0.05)
    return agent


def mixed_rows(agent: Agent, chats: list[Prompt], make_row: MakeRow) -> list[Row]:
    """Of several lengths and kinds of pictures."""
    return [make_row(agent, chat, [30 + index, 31, 32][: 1 + index % 3]) for index, chat in enumerate(chats)]


def to_learn_from(row: Row, logprobs: Sequence[float] | None = None, return_: float = 1.0) -> Sample:
    """A row whose replies were good, and were as likely as `logprobs` says."""
    ones = np.ones(sum(row.reply_lengths), np.float32)
    old = -6 * ones if logprobs is None else np.array(logprobs, np.float32)
    return Sample(row, old, emphasis=ones, advantages=ones, returns=return_ * ones, old=old)


def score(agent: Agent, rows: list[Row]) -> Scores:
    with torch.no_grad():
        return agent.score(rows)


def learn(agent: Agent, samples: list[Sample], tokens: int = 10_000) -> dict[str, float]:
    """One update of PPO."""
    learner = Learner(agent, agent.renderer, make_algorithm(ALGO, 96, tempered=False), ALGO, 1, Shares(tokens))
    return learner._update(samples, np.random.default_rng(0))


# ---- what is trained is what was sampled -----------------------------------------------------------------------------
@pytest.fixture
def play(end_soon: Callable[[Agent], Agent], chats: list[Prompt], row_of: RowOf) -> Play:
    """Samples of what an agent answers to chats of mixed length and pictures, ready to be learned from."""

    def played(agent: Agent) -> list[Sample]:
        rngs = [np.random.default_rng([0, index]) for index in range(2 * len(chats))]
        prompts = chats * 2
        replies = HFSampler(end_soon(agent)).generate(prompts, rngs, Sampling(ROOM))
        assert len({len(reply.token_ids) for reply in replies}) > 1
        samples = []
        for prompt, reply in zip(prompts, replies, strict=True):
            assert reply.value is not None
            samples.append(to_learn_from(row_of(prompt, reply), reply.logprobs, reply.value))
        return samples

    return played


@modes
@twins
def test_the_ratio_is_one_and_a_batch_of_one_is_a_batch_of_many(name: str, mode: str, play: Play):
    """With adapters whose dropout of a half must not act; pictures as features, and in micro-batches of some rows."""
    agent = load(name, mode, freeze_vision=True)
    samples = play(agent)
    rows = [sample.row for sample in samples]
    together = score(agent, rows)
    alone = [score(agent, [row]).logprobs for row in rows]
    torch.testing.assert_close(torch.cat(alone), together.logprobs, rtol=0, atol=1e-4)
    assert learn(agent, samples, tokens=300)["ratio_at_start"] == pytest.approx(1.0, abs=1e-4)
    assert not torch.equal(score(agent, rows).logprobs, together.logprobs)


@modes
@twins
def test_bfloat16_has_its_own_tolerance(name: str, mode: str, play: Play, values_of: Callable[..., Tensor]):
    """Its numbers have 8 bits, so what passes went through in other batches differs in the third digit; therefore the
    update takes its own log-probs for the old ones."""
    agent = load(name, mode, freeze_vision=True, dtype="bfloat16")
    assert {p.dtype for n, p in agent.model.named_parameters() if "layers.0.input_layernorm" in n} == {torch.bfloat16}
    samples = play(agent)
    rows = [sample.row for sample in samples]
    scores = score(agent, rows)
    values = values_of(agent, rows, scores)
    assert {scores.logprobs.dtype, scores.entropy.dtype, values.dtype} == {torch.float32}
    assert scores.states.dtype == torch.bfloat16
    sampled = torch.from_numpy(np.concatenate([sample.old for sample in samples]))
    difference = (scores.logprobs - sampled).abs()
    assert difference.mean() < 0.02
    assert difference.max() < 0.2
    metrics = learn(agent, samples)
    assert metrics["ratio_at_start"] == pytest.approx(1.0, abs=1e-4)  # between the update's own passes
    assert 0 < metrics["mismatch_kl"] < 0.05


@twins
def test_eager_attention_says_what_sdpa_says(name: str, play: Play):
    """Padded prompts with a shared prefix, and one that shares nothing."""
    eager, sdpa = (load(name, "full", freeze_vision=True, attention=kind) for kind in ("eager", "sdpa"))
    samples, others = play(eager), play(sdpa)
    for sample, other in zip(samples, others, strict=True):
        assert np.array_equal(sample.row.input_ids, other.row.input_ids)
        np.testing.assert_allclose(sample.old, other.old, rtol=0, atol=1e-4)
    rows = [sample.row for sample in samples]
    torch.testing.assert_close(score(eager, rows).logprobs, score(sdpa, rows).logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(score(eager, rows[:1]).logprobs, score(sdpa, rows[:1]).logprobs, rtol=0, atol=1e-4)


# ---- what learns -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", ["full", "qlora"])
@twins
def test_an_update_moves_the_chosen_part_and_nothing_else(
    name: str, mode: str, part: str, chats: list[Prompt], make_row: MakeRow
):
    agent = load(name, mode, train=TrainableConfig(**{one: one == part for one in PARTS}))
    before = {n: p.detach().clone() for n, p in agent.named_parameters()}
    learn(agent, list(map(to_learn_from, mixed_rows(agent, chats, make_row))))
    moved = {n for n, p in agent.named_parameters() if not torch.equal(p, before[n])}
    heads = {n for n in before if n.startswith("value_head.")}
    chosen = {n for n in before if agent.family.part_of(n) == part and (mode == "full" or "lora_" in n)} - heads
    assert heads <= moved
    assert moved <= chosen | heads
    # LLaVA reads the last layer but one of its CLIP; a key's bias moves all scores of a query alike
    idle = {n for n in chosen if "vision_tower" in n and ("layers.2." in n or "post_layernorm" in n)}
    assert {n for n in chosen - idle - moved if not n.endswith("k_proj.bias")} == set()
    assert len(chosen - idle) >= 2


@twins
def test_checkpointed_adapters_have_the_gradients_of_plain_ones(name: str, chats: list[Prompt], make_row: MakeRow):
    """Layers run again in the backward pass, their dropout of a half still off."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        agent = load(name, "qlora", gradient_checkpointing=checkpointing)
        calls: list[int] = []
        agent.family.text.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        agent.score(mixed_rows(agent, chats, make_row)).logprobs.sum().backward()
        gradients.append({n: p.grad for n, p in agent.model.named_parameters() if p.grad is not None})
        runs.append(len(calls))
    plain, again = gradients
    assert runs[1] == 2
    assert plain.keys() == again.keys()
    for parameter_name, gradient in plain.items():
        torch.testing.assert_close(again[parameter_name], gradient, rtol=1e-4, atol=1e-4)


def test_dropout_acts_where_a_model_is_told_to_train(chats: list[Prompt], make_row: MakeRow):
    agent = load("tiny", "lora")
    rows = mixed_rows(agent, chats, make_row)
    assert torch.equal(score(agent, rows).logprobs, score(agent, rows).logprobs)
    agent.train()
    assert not torch.equal(score(agent, rows).logprobs, score(agent, rows).logprobs)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------
def base_weights(agent: Agent) -> dict[str, Tensor]:
    """All but adapters and value head, under the names that they have without an adapter."""
    named = agent.model.get_base_model().named_parameters()
    return {n.replace(".base_layer", ""): p for n, p in named if "lora_" not in n}


@twins
def test_the_linear_layers_of_the_language_part_have_4_bits_and_nothing_else_changes(name: str):
    agent, plain = load(name, "qlora"), load(name, "full")
    quantised = {n: m for n, m in agent.model.get_base_model().named_modules() if isinstance(m, Linear4bit)}
    linear = {n for n, m in plain.model.named_modules() if isinstance(m, nn.Linear) and m is not plain.family.lm_head}
    assert {n.removesuffix(".base_layer") for n in quantised} == {
        n for n in linear if agent.family.part_of(n) == "language"
    }
    assert len(quantised) == 28  # 4 layers of 7
    for module in quantised.values():
        weight: Any = module.weight
        state = weight.quant_state
        assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.float32)
    weights, expected = base_weights(agent), dict(plain.model.named_parameters())
    assert weights.keys() == expected.keys()
    for parameter_name, weight in weights.items():
        if weight.dtype == torch.uint8:
            assert weight.numel() * 2 == expected[parameter_name].numel()
        else:
            assert torch.equal(weight, expected[parameter_name])


@twins
def test_an_adapter_finds_its_quantised_base_again(
    name: str, chats: list[Prompt], make_row: MakeRow, values_of: Callable[..., Tensor], tmp_path: Path
):
    agent = load(name, "qlora")
    rows = mixed_rows(agent, chats, make_row)
    learn(agent, list(map(to_learn_from, rows)))
    agent.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # the adapter alone
    again = load(name, "qlora", init=tmp_path)
    after, before = score(again, rows), score(agent, rows)
    assert torch.equal(after.logprobs, before.logprobs)
    assert torch.equal(values_of(again, rows, after), values_of(agent, rows, before))
    with again.reference(), agent.reference():
        assert torch.equal(again.score(rows).logprobs, agent.score(rows).logprobs)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in agent.named_parameters() if p.requires_grad
    ]


def test_without_bitsandbytes_there_are_no_4_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"model\.quantize=nf4 needs bitsandbytes: pip install it, or set"):
        load("tiny", "qlora")
