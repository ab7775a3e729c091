"""The agent: a vision-language model as policy, and a small head on its prompt state as critic.

One forward pass gives log-probs, entropies and hidden states of every reply in a batch. Two things make it cheap. The
hidden states are gathered at the reply tokens *before* `lm_head`, so no [N T vocabulary] tensor ever exists. And the
tokens that all rows begin with (the system message) go through the model once, not once a row.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_agents.errors import ModelError, TrainingError
from vlm_agents.models import adapters
from vlm_agents.models.batch import Tokens, collate
from vlm_agents.models.families import Family, text_inputs
from vlm_agents.models.fingerprint import save_base
from vlm_agents.models.heads import VALUE_FILE, TemperatureHead, ValueHead, save_heads
from vlm_agents.models.images import ImageStore
from vlm_agents.models.older import add_older_names
from vlm_agents.models.prefix import causal_mask
from vlm_agents.models.rendering import HFRenderer
from vlm_agents.models.vocabulary import reserved_ids
from vlm_agents.pictures import Picture
from vlm_agents.tensors import Row, Scores
from vlm_agents.weights import TEMPERATURE_FILE

BLANK = Picture(Image.new("RGB", (56, 56)))


class Agent(nn.Module):
    """Implements tensors.ActorCritic over one transformers model (`model` may be its PeftModel)."""

    banned: Tensor  # [V] bool
    sampled_elsewhere = False  # by a copy of the weights in another program
    zero = 0  # of hardware.zero: what is divided among ranks, which its engine says; see `embed` and `hidden`

    def __init__(
        self,
        model: Any,
        family: Family,
        tokenizer: Any,
        image_processor: Any,
        value_head: ValueHead,
        temperature: float,
        temperature_head: TemperatureHead | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.temperature = temperature
        self.temperature_head = temperature_head
        self.images = ImageStore(family)
        self.renderer = HFRenderer(tokenizer, family)
        self.register_buffer("banned", banned_tokens(tokenizer, family), persistent=False)
        frozen_parts = {self.family.part_of(name) for name, p in model.named_parameters() if not p.requires_grad}
        trained_parts = {self.family.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.images.frozen = {"vision", "projector"} <= frozen_parts - trained_parts

    @property
    def device(self) -> torch.device:
        return self.banned.device  # of a weight: asking for one by name fetches it, where weights are divided

    @property
    def exact(self) -> bool:
        return self.family.embed_tokens.weight.dtype == torch.float32 and not self.sampled_elsewhere

    # ---- forward -----------------------------------------------------------------------------------------------------
    def score(self, rows: Sequence[Row]) -> Scores:
        return self(rows)  # by nn.Module's call, as an engine that divides weights fetches them in its hooks

    def forward(self, rows: Sequence[Row]) -> Scores:
        tokens = self.collate(rows)
        reply_mask = tokens.reply_mask.to(self.device)
        states = self.hidden(tokens)[:, :-1][reply_mask[:, 1:]]  # the state at t - 1 predicts the token at t
        lengths = torch.tensor([length for row in rows for length in row.reply_lengths], device=self.device)
        turn = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
        temperature = self.temperatures(states[lengths.cumsum(0) - lengths])[turn]
        logits = self.logits(states)
        distribution = self.log_distribution(logits, temperature)
        targets = tokens.input_ids.to(self.device)[reply_mask]
        logprobs = distribution.gather(-1, targets[:, None]).squeeze(-1)
        scores = Scores(logprobs, entropy_of(distribution), states)
        if self.temperature_head is None:
            return scores
        tempered = entropy_of(self.log_distribution(logits.detach(), temperature))
        return replace(scores, temperature=temperature, tempered_entropy=tempered)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with torch.no_grad(), self.adapter_off(), self.images.seen_in(self._adapter_on):
            yield

    def value(self, states: Tensor) -> Tensor:
        return self.value_head(states)

    def logits(self, states: Tensor) -> Tensor:
        """[K V] over the vocabulary, fp32."""
        return self.family.lm_head(states).float()

    def log_distribution(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """[K V] log-probs of [K V] logits at [K] temperatures, banned tokens at minus infinity.

        The sampler and the losses both come through here: what is trained is what was sampled.
        """
        return torch.log_softmax((logits / temperature[:, None]).masked_fill(self.banned, -torch.inf), dim=-1)

    def temperatures(self, prompts: Tensor) -> Tensor:
        """[M] sampling temperature of the turns whose last prompt tokens have the states [M H]."""
        if self.temperature_head is None:
            return torch.full(prompts.shape[:1], self.temperature, device=prompts.device)
        return self.temperature_head(prompts)

    def collate(self, rows: Sequence[Row]) -> Tokens:
        return collate(rows, self.family, self.tokenizer.pad_token_id, self.renderer.context)

    def hidden(self, tokens: Tokens) -> Tensor:
        """[N T H] last hidden states of right-padded rows.

        No padding mask is needed: attention is causal and padding stands on the right. Text models take positions of
        one rotary axis as [N T], of several as [P N T]: hence `squeeze(0)`.

        Where weights are divided all ranks fetch them together, so that a pass must call the same modules on each: what
        rows have in common isn't run apart then, as other ranks' rows may have nothing in common.
        """
        input_ids, positions = tokens.input_ids.to(self.device), tokens.positions.to(self.device)
        shared = tokens.shared
        if not shared or self.checkpointing or self.zero == 3:
            with self.recomputing():
                inputs = self.embed(input_ids, tokens.images)
                return self.family.text(**inputs, position_ids=positions.squeeze(0), use_cache=False).last_hidden_state
        prefix, cache = self.run_prefix(input_ids[:1, :shared], positions[..., :1, :shared])
        for layer in cache.layers:
            assert isinstance(layer, DynamicLayer)
            layer.keys, layer.values = (
                state.expand(len(input_ids), -1, -1, -1) for state in (layer.keys, layer.values) if state is not None
            )
        width = input_ids.shape[1]
        suffix = self.family.text(
            **self.embed(input_ids[:, shared:], tokens.images),
            position_ids=positions[..., shared:].squeeze(0),
            attention_mask=self.attention_mask(causal_mask(width - shared, width, self.device)),
            **self.family.caching(cache),
        ).last_hidden_state
        return torch.cat([prefix.expand(len(input_ids), -1, -1), suffix], dim=1)

    def run_prefix(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, DynamicCache]:
        """[1 P H] states of one common prefix [1 P], and its keys and values."""
        cache = DynamicCache()
        output = self.family.text(
            inputs_embeds=self.family.embed_tokens(input_ids),
            position_ids=positions.squeeze(0),
            **self.family.caching(cache),
        )
        return output.last_hidden_state, cache

    def embed(self, input_ids: Tensor, images: Sequence[Picture]) -> dict[str, Any]:
        """What the text model reads: [N T H] token embeddings, with pictures' features at their placeholder tokens.

        Where gradients are divided all ranks sum them together, so that every pass must reach every trained parameter:
        without a picture what sees looks at a blank one, of which nothing is taken.
        """
        embeds, features = self.family.embed_tokens(input_ids), self.images.features(images)
        if features is None and self.zero and not self.images.frozen:
            blank = self.images.features([BLANK])
            assert blank is not None
            embeds = embeds + 0 * blank.sum().to(embeds.dtype)
        if features is None:
            return {"inputs_embeds": embeds}
        return text_inputs(embeds, input_ids == self.family.image_token_id, features)

    def attention_mask(self, seen: Tensor) -> Tensor:
        """[N 1 Q K] bool, as the text model wants it: its own, eager attention adds the mask to the scores."""
        if self.family.text.config._attn_implementation != "eager":
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    @property
    def checkpointing(self) -> bool:
        return bool(getattr(self.family.text, "gradient_checkpointing", False))

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Where checkpointing is on, have the layers run again in the backward pass instead of keeping activations.

        transformers does so in train mode only. Here the layers alone are switched to it, and not the dropout inside
        them: what is scored is what was sampled.
        """
        modules = self.model.modules() if self.checkpointing and torch.is_grad_enabled() else ()
        layers = [
            module for module in modules if isinstance(module, GradientCheckpointingLayer) and not module.training
        ]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    # ---- parameters and adapters -------------------------------------------------------------------------------------
    def parameters_by_role(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: `policy` of the transformers model, `temperature` and `value` of the heads."""
        heads = {"temperature": self.temperature_head, "value": self.value_head}
        return {
            "policy": [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            **{role: list(head.parameters()) for role, head in heads.items() if head is not None},
        }

    @property
    def apart(self) -> list[nn.Module]:
        """What one rank may call more often than another, so that its weights can't be divided among them: our heads,
        and what sees while it is frozen, as features are kept."""
        parts = {"vision", "projector"} if self.images.frozen else set[str]()
        seeing = [
            module
            for name, module in self.model.named_modules()
            if (own := [f"{name}.{parameter}" for parameter, _ in module.named_parameters()])
            and parts.issuperset(map(self.family.part_of, own))
        ]
        return [*self.heads().values(), *seeing]

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The policy that training started from. Only with LoRA: without an adapter there is nothing to switch off."""
        if not hasattr(self.model, "disable_adapter"):
            raise ModelError("no adapter to switch off: a reference policy needs model.lora")
        with self.gradients_kept(), self.model.disable_adapter(), self.at_temperature(self.temperature):
            yield

    @contextmanager
    def _adapter_on(self) -> Iterator[None]:
        self.model.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            self.model.base_model.disable_adapter_layers()

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """peft makes all of an adapter trainable that it switches to, frozen parts too."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            yield
        finally:
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Every turn at this temperature, whatever a temperature head says, and without teaching it anything."""
        before = self.temperature, self.temperature_head
        self.temperature, self.temperature_head = temperature, None
        try:
            yield
        finally:
            self.temperature, self.temperature_head = before

    # ---- disk --------------------------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """An HF folder: weights (or the adapter), tokenizer, processor; our own heads in a folder of theirs.

        TrainingError where training has left weights that aren't finite: they would say so only when they are used.
        """
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        if bad := [name for name, parameter in trained if not parameter.isfinite().all()]:
            raise TrainingError(f"{len(bad)} of {len(trained)} trained tensors aren't finite ({bad[0]}): lower the lr")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        add_older_names(folder)
        if settings := self.family.processor_config:
            (folder / "processor_config.json").write_text(json.dumps(settings, indent=2))
        if hasattr(self.model, "disable_adapter"):
            adapters.tidy(folder)
            save_base(self.model, folder)
        save_heads(self.heads(), folder)

    def heads(self) -> dict[str, nn.Module]:
        """The networks that are ours, by the file that holds them."""
        heads: dict[str, nn.Module] = {VALUE_FILE: self.value_head}
        return heads if self.temperature_head is None else heads | {TEMPERATURE_FILE: self.temperature_head}


class _Entropy(torch.autograd.Function):
    """Keeps nothing for its gradient but the log-probs, which softmax keeps anyway: where no loss asks for entropy, as
    much memory less as two of [K V] take."""

    @staticmethod
    def forward(ctx: Any, log_distribution: Tensor) -> Tensor:
        ctx.save_for_backward(log_distribution)
        return -(log_distribution.exp() * _finite(log_distribution)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (log_distribution,) = ctx.saved_tensors
        return -gradient[..., None] * log_distribution.exp() * (_finite(log_distribution) + 1)


def _finite(log_distribution: Tensor) -> Tensor:
    return log_distribution.masked_fill(log_distribution.isinf(), 0.0)


def entropy_of(log_distribution: Tensor) -> Tensor:
    """[...] entropy in nats of [... V] log-probs that may hold minus infinities, with a finite gradient there too."""
    return _Entropy.apply(log_distribution)


def banned_tokens(tokenizer: Any, family: Family) -> Tensor:
    """[V] bool: reserved tokens, and rows of the vocabulary that no token has.

    Of the special tokens only the end of turn may be sampled: an image placeholder would stand for no picture.
    """
    vocabulary = family.lm_head.weight.shape[0]
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    reserved = reserved_ids(tokenizer, family.image_token_id)
    banned[[index for index in reserved if index < vocabulary]] = True
    banned[tokenizer.eos_token_id] = False
    return banned
