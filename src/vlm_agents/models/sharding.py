"""What one rank holds of what a model needs: what DeepSpeed's ZeRO divides, what it adds, and what offload moves.

Nothing is divided here: that does DeepSpeed. Read from its source (0.19.8), on the safe side.
"""

import math
from dataclasses import replace
from typing import Any

from vlm_agents.config import HardwareConfig
from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.memory import FP32, Memory, size
from vlm_agents.world import BUCKET_BYTES

DEFAULTS = {  # of DeepSpeed, in parameters
    "reduce_bucket_size": 500_000_000,  # gradients that are summed at a time
    "stage3_max_live_parameters": 1_000_000_000,  # gathered at once in an update
    "stage3_prefetch_bucket_size": 50_000_000,  # and gathered ahead of their use
    "stage3_param_persistence_threshold": 100_000,  # what is smaller stays whole
}


def on_rank(need: Memory, agent: Agent, hardware: HardwareConfig) -> Memory:
    """One rank's memory, where `need` is that of a process alone at a rank's share of the work.

    buckets     the gradients that are summed at a time, flat: without ZeRO some 64 MiB; else DeepSpeed's bucket in the
                precision of the weights, no larger than all that is trained, and what is in it once more in fp32
    gradients, optimizer   with ZeRO, fp32, and a rank's part of them: 4 bytes a trained parameter, and 12 for
                DeepSpeed's own copy and two moments, whatever the precision of the weights
    optimizer_step  with ZeRO two copies of that part: the gradients as one tensor, and what AdamW works in
    weights     with zero=3 a rank's part, trained or not, and what is too small to be divided
    gathered    with zero=3, in sampling and to save: the weights whole, beside that part
    live        with zero=3, in an update: those that the layers at work need
    host        what offload keeps in the memory of the CPU instead, for one rank
    """
    largest = max(parameter.numel() for parameter in agent.parameters())
    if not hardware.zero:
        flat = min(max(BUCKET_BYTES, FP32 * largest), need.gradients)
        return replace(need, buckets=flat if hardware.ranks > 1 else 0)
    trained = sum(parameter.numel() for parameter in agent.parameters() if parameter.requires_grad)
    element = agent.family.embed_tokens.weight.element_size()
    bucket = elements(hardware, "reduce_bucket_size", trained)
    part = math.ceil(trained / hardware.ranks)
    need = replace(
        need,
        gradients=FP32 * part,
        optimizer=3 * FP32 * part,
        optimizer_step=2 * FP32 * part,
        buckets=element * bucket + FP32 * min(max(bucket, largest), trained),
    )
    if hardware.zero == 3:
        threshold = elements(hardware, "stage3_param_persistence_threshold")
        small = size([parameter for parameter in agent.parameters() if parameter.numel() < threshold])
        layers = sum(elements(hardware, f"stage3_{name}") for name in ("max_live_parameters", "prefetch_bucket_size"))
        need = replace(
            need,
            weights=math.ceil((need.weights - small) / hardware.ranks) + small,
            gathered=need.weights,
            live=min(need.weights, element * max(layers, largest)),
        )
    if hardware.offload == "none":
        return need
    state = need.optimizer + need.gradients + need.optimizer_step
    need = replace(need, host=state, optimizer=0, gradients=0, optimizer_step=0)
    return replace(need, host=state + need.weights, weights=0) if hardware.offload == "all" else need


def elements(hardware: HardwareConfig, name: str, most: float = math.inf) -> int:
    """DeepSpeed's setting of this name: that of hardware.deepspeed.zero_optimization, else its default, or `most`."""
    given: Any = (hardware.deepspeed or {}).get("zero_optimization") or {}
    return int(given.get(name, min(DEFAULTS[name], most)))
