"""Sampling: replies, log-probs, entropies and values out of the same passes.

A batch of prompts is prefilled once, what they all begin with only once for all of them, then decoded token by token
over transformers' cache. Rows leave the batch as they finish, keys and values are written in place, and every row draws
from its own random generator, so that what an episode gets doesn't depend on who shares the batch with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vlm_agents.errors import ModelError
from vlm_agents.models.actor_critic import Agent, entropy_of
from vlm_agents.models.prefix import causal_mask, shared_prefix
from vlm_agents.models.rendering import HFRenderer, Rendered
from vlm_agents.types import Prompt, Reply, Sampling

COMPACT_BELOW = 0.75  # share of live rows under which the finished ones are moved out of the cache


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow, so that a decoded token costs one write and no copy of the past."""

    def __init__(self, rows: int, capacity: int, prefix: Any = None) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.rows, self.capacity, self.prefix, self.length = rows, capacity, prefix, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            state.new_empty(self.rows, state.shape[1], self.capacity, state.shape[3])
            for state in (key_states, value_states)
        )
        if self.prefix is not None and self.prefix.keys is not None and self.prefix.values is not None:
            self.length = self.prefix.get_seq_length()
            self.keys[..., : self.length, :] = self.prefix.keys
            self.values[..., : self.length, :] = self.prefix.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., start : self.length, :] = key_states
        self.values[..., start : self.length, :] = value_states
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_seq_length(self) -> int:
        if self.is_initialized or self.prefix is None:
            return self.length
        return self.prefix.get_seq_length()

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows of the batch."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass(slots=True)
class Prefilled:
    """A batch that is ready to decode. Columns are: the shared prefix, then each row's own tokens, left-padded."""

    rendered: list[Rendered]
    cache: Cache
    layers: list[RoomyLayer]  # of the cache
    hidden: Tensor  # [N H] state of each row's last prompt token
    valid: Tensor | None  # [N columns] bool, None where no row is padded
    positions: Tensor  # [P N] position of each row's next token


class HFSampler:
    """Implements policies.Sampler with the agent's own weights."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.renderer = agent, agent.renderer

    def sync(self) -> None:
        self.agent.images.clear()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
    ) -> list[Reply]:
        """One reply a prompt. Greedy replies still carry the log-probs of the policy at its own temperature."""
        agent, max_new_tokens = self.agent, sampling.max_tokens
        ends = StopTexts(agent.renderer, sampling.stop)
        batch = self.prefill(prompts, max_new_tokens)
        values = agent.value(batch.hidden).tolist()
        temperatures = agent.temperatures(batch.hidden)
        count = len(prompts)
        draws = torch.from_numpy(np.stack([rng.random(max_new_tokens) for rng in rngs])).to(agent.device)
        tokens = np.zeros((count, max_new_tokens), dtype=np.int64)
        logprobs, entropies = (np.zeros((count, max_new_tokens), dtype=np.float32) for _ in range(2))
        lengths = np.full(count, max_new_tokens)
        live = torch.arange(count, device=agent.device)  # which prompt each row of the cache belongs to
        hidden, valid, positions = batch.hidden, batch.valid, batch.positions
        for step in range(max_new_tokens):
            distribution = agent.log_distribution(agent.logits(hidden), temperatures[live])
            chosen = distribution.argmax(-1) if sampling.greedy else draw(distribution, draws[live, step])
            rows = live.cpu().numpy()
            tokens[rows, step] = chosen.cpu().numpy()
            entropies[rows, step] = entropy_of(distribution).cpu().numpy()
            if np.isnan(entropies[rows, step]).any():  # then `chosen` may name no token at all
                raise ModelError(
                    "the model's logits aren't finite: its weights are broken, as by a learning rate too high"
                )
            logprobs[rows, step] = distribution.gather(-1, chosen[:, None]).squeeze(-1).cpu().numpy()
            ended = tokens[rows, step] == agent.renderer.end_of_turn
            # a finished row may stay in the cache for a while: only its first end counts
            done = rows[ended | ends.found(tokens[rows, : step + 1])]
            lengths[done] = np.minimum(lengths[done], step + 1)
            unfinished = torch.from_numpy(lengths[rows] == max_new_tokens).to(agent.device)
            if step + 1 == max_new_tokens or not unfinished.any():
                break
            if unfinished.float().mean() < COMPACT_BELOW:
                for layer in batch.layers:
                    layer.keep(unfinished)
                live, chosen, positions = live[unfinished], chosen[unfinished], positions[:, unfinished]
                valid = None if valid is None else valid[unfinished]
            if valid is not None:
                valid = torch.cat([valid, valid.new_ones(len(valid), 1)], dim=1)
            hidden = self.decode(chosen, positions, valid, batch.cache)
            positions = positions + 1
        return [
            self._reply(batch.rendered[i], tokens[i, :length], logprobs[i], entropies[i], values[i], ends)
            for i, length in enumerate(lengths)
        ]

    @torch.no_grad()
    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        """The critic's estimate for each prompt."""
        return self.agent.value(self.prefill(prompts, 0).hidden).tolist() if prompts else []

    def decode(self, chosen: Tensor, positions: Tensor, valid: Tensor | None, cache: Cache) -> Tensor:
        """[n H] states after one more token a row."""
        agent = self.agent
        output = agent.family.text(
            inputs_embeds=agent.family.embed_tokens(chosen[:, None]),
            position_ids=positions[..., None].squeeze(0),
            attention_mask=None if valid is None else agent.attention_mask(valid[:, None, None, :]),
            **agent.family.caching(cache),
        )
        return output.last_hidden_state[:, -1]

    def prefill(self, prompts: Sequence[Prompt], room: int) -> Prefilled:
        """Run the prompts through the model, leaving `room` columns for tokens to come."""
        agent, family = self.agent, self.agent.family
        rendered = [agent.renderer.render(prompt) for prompt in prompts]
        positions = [family.positions(row.ids, [image.size for image in row.images]) for row in rendered]
        shared = shared_prefix([row.ids for row in rendered], family.image_token_id)
        width = max(len(row.ids) for row in rendered) - shared
        ids = torch.full((len(rendered), width), agent.tokenizer.pad_token_id)
        own = torch.zeros(positions[0].shape[0], len(rendered), width, dtype=torch.long)
        valid = torch.zeros(len(rendered), shared + width, dtype=torch.bool)
        valid[:, :shared] = True
        for index, row in enumerate(rendered):
            length = len(row.ids) - shared
            ids[index, width - length :] = torch.from_numpy(row.ids[shared:])
            own[:, index, width - length :] = torch.from_numpy(positions[index][:, shared:])
            valid[index, shared + width - length :] = True
        ids, own, valid = (tensor.to(agent.device) for tensor in (ids, own, valid))

        prefix = None
        if shared:
            head = torch.from_numpy(rendered[0].ids[None, :shared]).to(agent.device)
            _, prefix = agent.run_prefix(head, torch.from_numpy(positions[0][:, None, :shared]).to(agent.device))
        capacity = shared + width + room
        layers = [
            RoomyLayer(len(rendered), capacity, prefix.layers[i] if prefix else None)
            for i in range(family.text.config.num_hidden_layers)
        ]
        cache = Cache(layers=list(layers))
        padded = not bool(valid.all())
        mask = causal_mask(width, shared + width, agent.device)
        if padded:
            # a padding column sees itself, so that no row of the attention is empty; nothing else sees it
            itself = torch.eye(shared + width, dtype=torch.bool, device=agent.device)[shared:]
            mask = (mask & valid[:, None, None, :]) | itself
        hidden = family.text(
            **agent.embed(ids, [image for row in rendered for image in row.images]),
            position_ids=own.squeeze(0),
            attention_mask=agent.attention_mask(mask) if padded or shared else None,
            **family.caching(cache),
        ).last_hidden_state
        following = own.amax(-1).amax(0).expand(own.shape[:2]) + 1  # the next token's position, on all rotary axes
        return Prefilled(rendered, cache, layers, hidden[:, -1], valid if padded else None, following)

    def _reply(
        self,
        rendered: Rendered,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        entropies: np.ndarray,
        value: float,
        ends: "StopTexts",
    ) -> Reply:
        ids, length = tokens.tolist(), len(tokens)
        renderer = self.renderer
        ended = ids[-1] == renderer.end_of_turn or ends.found(tokens[None]).any()
        return Reply(
            text=renderer.decode(ids),
            prompt_token_ids=tuple(rendered.ids.tolist()),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs[:length].tolist()),
            value=value,
            entropy=float(entropies[:length].mean()),
            finish="stop" if ended else "length",
        )


class StopTexts:
    """Finds where one of the texts that end a reply has just been written."""

    def __init__(self, renderer: HFRenderer, texts: Sequence[str]) -> None:
        self.renderer, self.texts = renderer, texts
        # each token writes a byte at least, but for one before the text whose space the decoder drops
        self.longest = max((len(text.encode()) + 1 for text in texts), default=0)

    def found(self, tokens: np.ndarray) -> np.ndarray:
        """[n] does the text of the last of [n t] tokens hold one?"""
        if not self.texts:
            return np.zeros(len(tokens), dtype=bool)
        tails = [self.renderer.decode(row) for row in tokens[:, -self.longest :].tolist()]
        return np.array([any(text in tail for text in self.texts) for tail in tails], dtype=bool)


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """[n] tokens by inverting the cumulative distribution of [n V] log-probs at `uniform` [n], doubles in [0, 1)."""
    cumulative = distribution.double().exp().cumsum(-1)
    # the largest double under 1 times the total is under the total after rounding too: no point is past the last token
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
