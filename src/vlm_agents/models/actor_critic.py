"""The agent: a vision-language model as policy, and a small head on its prompt state as critic.

One forward pass gives log-probs, entropies and values of every reply in a batch. Two things make it cheap. The hidden
states are gathered at the reply tokens *before* `lm_head`, so no [N T vocabulary] tensor ever exists. And the tokens
that all rows begin with (the system message) go through the model once, not once a row, which is exact, because
attention is causal.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_agents.config import TemperatureHeadConfig, ValueHeadConfig
from vlm_agents.errors import ModelError, TrainingError
from vlm_agents.models import adapters
from vlm_agents.models.families import Family, text_inputs
from vlm_agents.models.fingerprint import save_base
from vlm_agents.models.images import ImageStore
from vlm_agents.models.older import add_older_names
from vlm_agents.models.rendering import HFRenderer
from vlm_agents.models.vocabulary import reserved_ids
from vlm_agents.tensors import Scores, Tokens
from vlm_agents.weights import TEMPERATURE_FILE

# In a folder of their own: servers (vLLM, SGLang) read every *.safetensors that lies beside config.json.
VALUE_FILE = "heads/value_head.safetensors"
WORTH_SHARING = 8  # tokens; a shorter common prefix costs more bookkeeping than it saves


class ValueHead(nn.Module):
    """Hidden state of the last prompt token -> expected return, fp32 whatever the backbone's dtype."""

    def __init__(self, width: int, config: ValueHeadConfig) -> None:
        super().__init__()
        self.stop_gradient = config.stop_gradient
        last = nn.Linear(config.hidden, 1)
        nn.init.zeros_(last.weight)  # a fresh critic expects nothing, rather than noise
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.net((hidden.detach() if self.stop_gradient else hidden).float()).squeeze(-1)


class TemperatureHead(nn.Module):
    """Hidden state of the last prompt token -> the temperature at which this turn's reply is sampled, fp32.

    The policy is then softmax(logits / temperature(prompt)): the policy gradient reaches the head through the
    log-probs, and makes replies sharper where that pays, and more varied where it doesn't. No gradient passes through
    the head to the backbone.
    """

    def __init__(self, width: int, config: TemperatureHeadConfig, start: float) -> None:
        super().__init__()
        self.low, self.high = config.low, config.high
        last = nn.Linear(config.hidden, 1)
        share = math.log(start / self.low) / math.log(self.high / self.low)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)))  # a fresh head says `start` everywhere
        self.net = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        share = torch.sigmoid(self.net(hidden.detach().float()).squeeze(-1))
        return self.low * (self.high / self.low) ** share


class Agent(nn.Module):
    """Implements tensors.ActorCritic over one transformers model (`model` may be its PeftModel)."""

    banned: Tensor  # [V] bool

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
        self.renderer = HFRenderer(tokenizer, family, self.images)
        self.register_buffer("banned", banned_tokens(tokenizer, family), persistent=False)
        frozen_parts = {self.family.part_of(name) for name, p in model.named_parameters() if not p.requires_grad}
        trained_parts = {self.family.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.images.frozen = {"vision", "projector"} <= frozen_parts - trained_parts

    @property
    def device(self) -> torch.device:
        return self.family.embed_tokens.weight.device

    @property
    def exact(self) -> bool:
        return self.family.embed_tokens.weight.dtype == torch.float32

    # ---- forward -----------------------------------------------------------------------------------------------------
    def score(self, tokens: Tokens) -> Scores:
        """Log-probs [K] and entropies [K] of the reply tokens, values [M] of the turns; differentiable."""
        reply_mask = tokens.reply_mask.to(self.device)
        hidden = self.hidden(tokens)
        states = hidden[:, :-1][reply_mask[:, 1:]]  # the state at t - 1 predicts the token at t
        starts = reply_mask[:, 1:] & ~reply_mask[:, :-1]
        prompts = hidden[:, :-1][starts]
        temperature = self.temperatures(prompts)
        turn_of_token = (starts.flatten().cumsum(0) - 1)[reply_mask[:, 1:].flatten()]
        logits = self.logits(states)
        distribution = self.log_distribution(logits, temperature[turn_of_token])
        targets = tokens.input_ids.to(self.device)[reply_mask]
        logprobs = distribution.gather(-1, targets[:, None]).squeeze(-1)
        scores = Scores(logprobs, entropy_of(distribution), self.value(prompts), prompts.detach())
        if self.temperature_head is None:
            return scores
        tempered = entropy_of(self.log_distribution(logits.detach(), temperature[turn_of_token]))
        return replace(scores, temperature=temperature, tempered_entropy=tempered)

    @torch.no_grad()
    def reference_logprobs(self, tokens: Tokens) -> Tensor:
        """[K] log-probs under the model with its adapter off."""
        with self.adapter_off():
            return self.score(tokens).logprobs

    def value(self, states: Tensor) -> Tensor:
        """[M] expected return after the prompts whose last tokens have the states [M H]."""
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

    def hidden(self, tokens: Tokens) -> Tensor:
        """[N T H] last hidden states of right-padded rows.

        No padding mask is needed: attention is causal and padding stands on the right. Text models take positions of
        one rotary axis as [N T], of several as [P N T]: hence `squeeze(0)`.
        """
        input_ids = tokens.input_ids.to(self.device)
        positions = tokens.mm["position_ids"].to(self.device)
        shared = 0 if self.checkpointing else shared_prefix(tokens, self.family.image_token_id)
        if shared < WORTH_SHARING:
            with self.recomputing():
                inputs = self.embed(input_ids, tokens.mm)
                return self.family.text(**inputs, position_ids=positions.squeeze(0), use_cache=False).last_hidden_state
        cache = DynamicCache()
        prefix = self.run_prefix(input_ids[:1, :shared], positions[..., :1, :shared], cache, len(input_ids))
        width = input_ids.shape[1]
        suffix = self.family.text(
            **self.embed(input_ids[:, shared:], tokens.mm),
            position_ids=positions[..., shared:].squeeze(0),
            attention_mask=self.attention_mask(causal_mask(width - shared, width, self.device)),
            **self.family.caching(cache),
        ).last_hidden_state
        return torch.cat([prefix.expand(len(input_ids), -1, -1), suffix], dim=1)

    def run_prefix(self, input_ids: Tensor, positions: Tensor, cache: DynamicCache, rows: int) -> Tensor:
        """Run one common prefix [1 P] through the text model and lay its keys and values out for `rows` rows."""
        hidden = self.family.text(
            inputs_embeds=self.family.embed_tokens(input_ids),
            position_ids=positions.squeeze(0),
            **self.family.caching(cache),
        ).last_hidden_state
        for layer in cache.layers:
            assert isinstance(layer, DynamicLayer)
            layer.keys, layer.values = (
                state.expand(rows, -1, -1, -1) for state in (layer.keys, layer.values) if state is not None
            )
        return hidden

    def embed(self, input_ids: Tensor, mm: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the text model reads: [N T H] token embeddings, with picture features at their placeholder tokens."""
        embeds = self.family.embed_tokens(input_ids)
        if "image_features" in mm:
            features = mm["image_features"]
        elif "pixel_values" in mm:
            distinct = self.family.encode(dict(mm))
            features = torch.cat([distinct[index] for index in mm["image_index"].tolist()])
        else:
            return {"inputs_embeds": embeds}
        return text_inputs(embeds, input_ids == self.family.image_token_id, features)

    def attention_mask(self, seen: Tensor) -> Tensor:
        """[N 1 Q K] bool, as the text model wants it: its own, eager attention adds the mask to the scores."""
        if self.family.text.config._attn_implementation != "eager":
            return seen
        dtype = self.family.embed_tokens.weight.dtype
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

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The policy that training started from. Only with LoRA: without an adapter there is nothing to switch off."""
        if not hasattr(self.model, "disable_adapter"):
            raise ModelError("no adapter to switch off: a reference policy needs model.lora")
        with self.model.disable_adapter(), self.at_temperature(self.temperature):
            yield

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
        for name, head in self.heads().items():
            (folder / name).parent.mkdir(exist_ok=True)
            save_file(head.state_dict(), folder / name, metadata=meaning_of(head))

    def heads(self) -> dict[str, nn.Module]:
        """The networks that are ours, by the file that holds them."""
        heads: dict[str, nn.Module] = {VALUE_FILE: self.value_head}
        return heads if self.temperature_head is None else heads | {TEMPERATURE_FILE: self.temperature_head}

    def load_heads(self, folder: Path) -> None:
        """Take the heads saved in `folder`; one that isn't there stays fresh, one that means another is refused."""
        if self.temperature_head is None and (folder / TEMPERATURE_FILE).is_file():
            raise ModelError(f"{folder / TEMPERATURE_FILE} would go unused: add model/temperature_head=learned")
        for name, head in self.heads().items():
            path = folder / name
            if not path.is_file():
                continue
            try:
                state, own = load_file(path), head.state_dict()
                with safe_open(path, "pt") as file:
                    bounds = (file.metadata() or {}).get("settings")
            except SafetensorError as error:
                raise ModelError(
                    f"{path} is damaged ({error}): put a whole copy there, or delete it for a fresh head"
                ) from error
            if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
                raise ModelError(
                    f"{path}: its shapes differ from model.{path.stem}; delete it, or use the hidden size it has"
                )
            if bounds and bounds != meaning_of(head).get("settings"):
                raise ModelError(f"{path} was trained within other bounds: set {bounds}")
            head.load_state_dict(state)


def meaning_of(head: nn.Module) -> dict[str, str]:
    """What a head's weights don't say and yet mean: the bounds of a temperature.

    One entry at most: safetensors writes several in any order, and equal runs leave equal files.
    """
    if not isinstance(head, TemperatureHead):
        return {}
    return {"settings": f"model.temperature_head.low={head.low:g} model.temperature_head.high={head.high:g}"}


def entropy_of(log_distribution: Tensor) -> Tensor:
    """[...] entropy in nats of [... V] log-probs that may hold minus infinities, with a finite gradient there too."""
    finite = log_distribution.masked_fill(log_distribution.isinf(), 0.0)
    return -(log_distribution.exp() * finite).sum(-1)


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


def shared_prefix(tokens: Tokens, image_token_id: int) -> int:
    """Number of leading tokens that all rows have in common, before any picture or reply."""
    ids = tokens.input_ids
    common = (ids == ids[:1]).all(0) & (ids[0] != image_token_id) & ~tokens.reply_mask.any(0)
    length = int(common.long().cumprod(0).sum())
    first_reply = int(tokens.reply_mask.any(0).long().argmax())
    return min(length, first_reply - 1)  # each row keeps a token of its own before its reply: the value is read there


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1 1 Q K] bool mask of the last `queries` of `keys` positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
