"""What a rank holds, against figures worked out from the published size of a model and DeepSpeed's defaults."""

from collections.abc import Callable
from typing import Any

import pytest

from vlm_agents.config import HardwareConfig, RunConfig
from vlm_agents.models import Agent
from vlm_agents.models.memory import Memory, Work, blueprint, estimate
from vlm_agents.models.sharding import on_rank

HEAD = 2048 * 128 + 128 + 128 + 1  # parameters of the value head, in fp32
MODEL = 3_754_622_976  # of Qwen2.5-VL-3B, in bfloat16; all of it is trained here
WEIGHTS = 2 * MODEL + 4 * HEAD
PART = 469_360_673  # of 3,754,885,377 on one of 8 ranks, rounded up
BUCKETS = 2 * 500_000_000 + 4 * 500_000_000  # DeepSpeed's default: the bucket, and what is in it in fp32
WORK = Work(num_envs=8, prompt=400, reply=96, patches=0, picture_tokens=0, microbatch=4096)


@pytest.fixture
def agent(compose_run: Callable[..., RunConfig]) -> Agent:
    return blueprint(compose_run("stage=eval", "model=qwen2_5_vl_3b").model, gpus())


def gpus(**settings: Any) -> HardwareConfig:
    return HardwareConfig("gpus", device="cuda", dtype="bfloat16", processes=8, **settings)


def rank(agent: Agent, **settings: Any) -> Memory:
    return on_rank(estimate(agent, WORK, "cuda"), agent, gpus(**settings))


def test_ddp_divides_nothing(agent: Agent):
    alone = estimate(agent, WORK, "cuda")
    largest = 4 * 151_936 * 2048  # the embedding: more than the 64 MiB that are sent at a time
    assert rank(agent) == Memory(**{**fields(alone), "buckets": largest})
    assert on_rank(alone, agent, HardwareConfig("gpu", device="cuda")) == alone


def test_zero_2_divides_gradients_and_optimizer(agent: Agent):
    need = rank(agent, zero=2)
    assert (need.weights, need.gathered, need.live, need.host) == (WEIGHTS, 0, 0, 0)
    assert need.gradients == 4 * PART
    assert need.optimizer == 12 * PART  # fp32: a copy and two moments
    assert need.optimizer_step == 8 * PART
    assert need.buckets == BUCKETS
    assert need.update == WEIGHTS + 16 * PART + BUCKETS + max(need.activations + need.logits, 8 * PART)
    assert need.sampling == WEIGHTS + 12 * PART + need.kv_cache + need.prefill


def test_zero_3_divides_weights_too_and_gathers_them_to_play(agent: Agent):
    need = rank(agent, zero=3)
    small = sum(p.nbytes for p in agent.parameters() if p.numel() < 100_000)  # biases, norms
    assert 0 < small < 0.001 * WEIGHTS
    assert need.weights == pytest.approx((WEIGHTS - small) / 8 + small, abs=1)
    assert need.gathered == WEIGHTS
    assert need.live == 2 * 1_050_000_000  # what may be gathered at once, and ahead
    standing = need.weights + 16 * PART + BUCKETS  # DeepSpeed keeps gradients and buckets while it plays
    assert need.sampling == standing + WEIGHTS + need.kv_cache + need.prefill
    assert need.update == standing + max(need.live + need.activations + need.logits, 8 * PART)


def test_offload_moves_it_to_the_cpu(agent: Agent):
    state = rank(agent, zero=2, offload="optimizer")
    assert (state.gradients, state.optimizer, state.optimizer_step) == (0, 0, 0)
    assert state.host == 24 * PART  # 4 + 12 + 8 bytes of each
    assert (state.weights, state.buckets) == (WEIGHTS, BUCKETS)
    everything, divided = rank(agent, zero=3, offload="all"), rank(agent, zero=3)
    assert everything.weights == 0
    assert everything.host == 24 * PART + divided.weights
    assert everything.gathered == WEIGHTS  # it is played on the GPU all the same


def test_a_smaller_bucket_is_counted_as_it_is_set(agent: Agent):
    """The embedding has 311,164,928 elements: larger than the bucket, its gradient goes alone."""
    given = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
    assert rank(agent, zero=2, deepspeed=given).buckets == 2 * 50_000_000 + 4 * 311_164_928


def test_little_that_is_trained_needs_a_little_bucket(agent: Agent):
    """It is as small, then. With the value head alone trained:"""
    agent.model.requires_grad_(False)
    need = rank(agent, zero=3)
    assert need.buckets == (2 + 4) * HEAD
    assert need.optimizer == 12 * -(-HEAD // 8)
    assert need.gathered == WEIGHTS  # what is frozen is divided and gathered like the rest


def fields(memory: Memory) -> dict[str, int]:
    return {name: getattr(memory, name) for name in Memory.__dataclass_fields__}
