"""What one rank holds of what a model needs: what DeepSpeed's ZeRO divides, what it adds, and what offload moves.

Nothing is divided here: that does DeepSpeed. Read from its source (0.19.8), on the safe side.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

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

    ZeRO divides all but what stands `apart` in the agent, which every rank has whole: its heads, whose optimizer is
    torch's, and what sees while it is frozen.

    buckets     the gradients that are summed at a time, flat: without ZeRO some 64 MiB; else DeepSpeed's bucket in the
                precision of the weights, no larger than all that is trained, and what is in it once more in fp32
    gradients, optimizer   with ZeRO, fp32, and a rank's part of them: 4 bytes a trained parameter, and 12 for
                DeepSpeed's own copy and two moments, whatever the precision of the weights
    optimizer_step  with ZeRO two copies of that part: the gradients as one tensor, and what AdamW works in
    weights     with zero=3 a rank's part, trained or not, and what is apart, or too small to be divided
    gathered    with zero=3, in sampling and to save: what is divided whole, beside that part
    live        with zero=3, in an update: what the layers at work need of it
    host        what this rank has in the memory of the CPU: of what offload keeps there, and of the copies and moments
                that ranks collect whole to save them, 12 bytes a trained parameter of all ranks together
    """
    if not hardware.zero:
        largest = max(parameter.numel() for parameter in agent.parameters())
        flat = min(max(BUCKET_BYTES, FP32 * largest), need.gradients)
        return replace(need, buckets=flat if hardware.ranks > 1 else 0)
    apart = {parameter for module in agent.apart for parameter in module.parameters()}
    divided = [parameter for parameter in agent.parameters() if parameter not in apart]
    trained = count([parameter for parameter in divided if parameter.requires_grad])
    heads = count([parameter for parameter in apart if parameter.requires_grad])
    largest = max(parameter.numel() for parameter in divided)
    element = agent.family.embed_tokens.weight.element_size()
    bucket = elements(hardware, "reduce_bucket_size", trained)
    part = math.ceil(trained / hardware.ranks)
    need = replace(
        need,
        gradients=FP32 * (part + heads),
        optimizer=FP32 * (3 * part + 2 * heads),
        optimizer_step=FP32 * (2 * part + heads),
        buckets=element * bucket + FP32 * min(max(bucket, largest), trained),
        host=3 * FP32 * part,
    )
    weights = 0  # a rank's part of them
    if hardware.zero == 3:
        threshold = elements(hardware, "stage3_param_persistence_threshold")
        whole = size([*apart, *(parameter for parameter in divided if parameter.numel() < threshold)])
        layers = sum(elements(hardware, f"stage3_{name}") for name in ("max_live_parameters", "prefetch_bucket_size"))
        gathered = need.weights - size(list(apart))
        weights = math.ceil((need.weights - whole) / hardware.ranks)
        live = min(gathered, element * max(layers, largest))
        need = replace(need, weights=weights + whole, gathered=gathered, live=live)
    if hardware.offload == "none":
        return need
    need = replace(  # it steps and saves one after the other
        need,
        gradients=FP32 * heads,
        optimizer=2 * FP32 * heads,
        optimizer_step=FP32 * heads,
        host=4 * FP32 * part + max(2 * FP32 * part, need.host),
    )
    if hardware.offload == "all":
        need = replace(need, weights=need.weights - weights, host=need.host + weights)
    return need


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def elements(hardware: HardwareConfig, name: str, most: float = math.inf) -> int:
    """DeepSpeed's setting of this name: that of hardware.deepspeed.zero_optimization, else its default, or `most`."""
    given: Any = (hardware.deepspeed or {}).get("zero_optimization") or {}
    return int(given.get(name, min(DEFAULTS[name], most)))
