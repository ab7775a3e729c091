"""What a model needs in memory, from its configuration alone: nothing is read, drawn or run on a device.

The agent is built on torch's meta device, where tensors have shapes and no content; its parameters and the tensors that
its layers would keep for a backward pass are then counted. Estimates, on the safe side: rows that share their system
message keep it once, which isn't counted here, and what libraries and fragmentation take is `ROOM`.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_agents.config import HardwareConfig, ModelConfig
from vlm_agents.models.actor_critic import Agent
from vlm_agents.models.batch import position_axes
from vlm_agents.models.images import ENCODE_AT_ONCE, KEEP_BYTES
from vlm_agents.models.loading import load_agent
from vlm_agents.models.prefix import causal_mask

ROOM = 1.1  # what is asked of a machine, over what is counted
LOGIT_COPIES = 6  # [reply tokens, vocabulary] in fp32 at once, from log-softmax to the gradient of the entropy
VISION_KEEPS = 2  # bytes kept by a trained vision part, over those that enter and leave its linear layers (1.1 to 2.0)
FP32 = 4  # bytes
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: 4 bits, one byte for 64 of them, one fp32 for 256 of those
PROBE = 8  # tokens; so few that attention weights, which real kernels never keep, count for nothing


@dataclass(frozen=True, slots=True)
class Work:
    """How much is done at once. Lengths are in tokens."""

    num_envs: int
    prompt: int
    reply: int
    patches: int  # of the vision part, in the pictures of one prompt
    picture_tokens: int  # in one prompt
    microbatch: int
    continued: bool = False  # chats are kept from turn to turn, beside those that are sampled

    @property
    def rows(self) -> int:
        """Rows of a micro-batch; one that is longer than it goes alone."""
        return max(1, self.microbatch // (self.prompt + self.reply))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. Weights and optimizer stay; the rest comes and goes with what is being done.

    The last four are those of several ranks and of ZeRO: see `sharding.on_rank`.
    """

    weights: int
    optimizer: int
    kv_cache: int
    prefill: int
    gradients: int
    activations: int
    logits: int
    optimizer_step: int
    buckets: int = 0
    gathered: int = 0
    live: int = 0
    host: int = 0

    @property
    def sampling(self) -> int:
        standing = self.gradients + self.buckets if self.gathered else 0  # zero=3 never frees them
        return self.weights + self.optimizer + standing + self.gathered + self.kv_cache + self.prefill

    @property
    def update(self) -> int:
        standing = self.weights + self.optimizer + self.gradients + self.buckets
        return standing + max(self.live + self.activations + self.logits, self.optimizer_step)

    @property
    def peak(self) -> int:
        return max(self.sampling, self.update)


def blueprint(cfg: ModelConfig, hardware: HardwareConfig) -> Agent:
    """The agent of `cfg` on the meta device, its weights not quantised.

    A local folder is asked for its config.json, else `model.architecture`.
    """
    os.environ.setdefault("DS_ACCELERATOR", hardware.device.split(":")[0])  # before the loader takes meta for one
    local = cfg.path is not None and Path(cfg.path).is_dir()
    shape = replace(cfg, weights="random", quantize=None, architecture=None if local else cfg.architecture)
    return load_agent(shape, replace(hardware, device="meta"))


def estimate(agent: Agent, work: Work, device: str, quantize: str | None = None) -> Memory:
    """The memory of an agent of `blueprint` at this work.

    weights       bytes of all parameters, tied ones once; where quantised, NF4 for those of the linear layers
    gradients     as many bytes as the trained parameters
    optimizer     AdamW: two moments of each trained parameter, and a copy of those that aren't fp32, all in fp32
    optimizer_step  on a GPU all of them are updated at once: one copy more; on a CPU one by one; and the gradients of
                  the copies
    kv_cache      2 x layers x key-value heads x head size x bytes x (prompt + reply) x envs; twice that where chats
                  are continued
    prefill       what one layer makes of all prompts at once, and the features of pictures that are kept for later
    activations   what autograd keeps of a micro-batch: see `kept_per_token`; with gradient checkpointing only the
                  layers' inputs, and one layer in full. A trained vision part: VISION_KEEPS x `linear_bytes`
    logits        LOGIT_COPIES x 4 bytes x reply tokens of a micro-batch x vocabulary
    """
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    copied = FP32 * sum(parameter.numel() for parameter in trained if parameter.dtype != torch.float32)
    stepped = [FP32 * parameter.numel() for parameter in trained]
    vocabulary = agent.family.lm_head.weight.shape[0]
    tokens = work.rows * (work.prompt + work.reply)
    layers = agent.family.text.config.num_hidden_layers
    with_grad = kept_per_token(agent, recompute=False)
    checkpointed = getattr(agent.family.text, "gradient_checkpointing", False)
    kept = (kept_per_token(agent, recompute=True) + with_grad // layers if checkpointed else with_grad) * tokens
    pictures = linear_bytes(agent, "vision") * work.patches + linear_bytes(agent, "projector") * work.picture_tokens
    looks = min(work.num_envs, ENCODE_AT_ONCE) * pictures // vision_layers(agent)
    return Memory(
        weights=size(list(agent.parameters())) - (nf4_saves(agent) if quantize else 0),
        optimizer=2 * sum(stepped) + copied,
        kv_cache=kv_bytes_per_token(agent) * work.num_envs * (work.prompt + work.reply) * (1 + work.continued),
        prefill=max(with_grad // layers * work.num_envs * work.prompt, looks) + feature_bytes(agent, work),
        gradients=size(trained),
        activations=kept + (0 if agent.images.frozen else VISION_KEEPS * pictures * work.rows),
        logits=LOGIT_COPIES * FP32 * work.rows * work.reply * vocabulary,
        optimizer_step=(max(stepped, default=0) if device == "cpu" else sum(stepped)) + copied,
    )


def size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def nf4_saves(agent: Agent) -> int:
    """Bytes less where the linear layers of the text part are quantised; its output layer isn't."""
    weights = [module.weight for module in linears(agent, "language")]
    return sum(w.nbytes - round(NF4 * w.numel()) for w in weights if w is not agent.family.lm_head.weight)


def kv_bytes_per_token(agent: Agent) -> int:
    """Keys and values of one token in all layers."""
    text = agent.family.text.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    element = agent.family.embed_tokens.weight.element_size()
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * element


@lru_cache(maxsize=64)  # advice asks for the same agents again and again
def kept_per_token(agent: Agent, recompute: bool) -> int:
    """Bytes that autograd keeps for a token in the text part: those of the distinct tensors of a pass over a few."""
    weights = {parameter.untyped_storage()._cdata for parameter in agent.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    text, embedding = agent.family.text, agent.family.embed_tokens.weight
    embeds = embedding.new_empty(1, PROBE, embedding.shape[1]).requires_grad_(embedding.requires_grad)
    positions = torch.zeros(position_axes(agent.family), 1, PROBE, dtype=torch.long, device=embedding.device)
    before, text.gradient_checkpointing = text.gradient_checkpointing, recompute
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), agent.recomputing():
        text(
            inputs_embeds=embeds,
            position_ids=positions.squeeze(0),
            attention_mask=causal_mask(PROBE, PROBE, embedding.device),
            use_cache=False,
        )
    text.gradient_checkpointing = before
    return sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - weights) // PROBE


def linear_bytes(agent: Agent, part: str) -> int:
    """Bytes that enter and leave the linear layers of a part, for one of its tokens."""
    return sum((m.in_features + m.out_features) * m.weight.element_size() for m in linears(agent, part))


def linears(agent: Agent, part: str) -> list[nn.Linear]:
    """The linear layers of a part, without those of an adapter."""
    return [
        module
        for name, module in agent.model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and agent.family.part_of(name) == part
    ]


def vision_layers(agent: Agent) -> int:
    vision = agent.model.config.vision_config
    return getattr(vision, "depth", None) or vision.num_hidden_layers


def feature_bytes(agent: Agent, work: Work) -> int:
    """Features of the pictures of all envs, where they are kept."""
    embedding = agent.family.embed_tokens.weight
    one = work.picture_tokens * embedding.shape[1] * embedding.element_size()
    return min(KEEP_BYTES, work.num_envs * one) if agent.images.frozen else 0


def patches_of(agent: Agent, pixels: Tensor) -> int:
    """Patches in `pixel_values`: a patch is what the first convolution of the vision part takes at once."""
    first = next(module for module in agent.model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    return pixels.numel() // first.weight[0].numel()
