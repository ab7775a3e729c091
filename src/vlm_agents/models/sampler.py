"""Sampling: replies, log-probs, entropies and values out of the same passes.

A batch of prompts is prefilled once, what they all begin with only once for all of them, and of chats that go on only
what is new. Then it is decoded over transformers' cache: each pass reads a row's last token and a draft of what may
follow, and keeps the draft as far as it is what would have been sampled. Every token is drawn from the model's own
distribution with the random number of its place in its own row's generator, so that neither drafts nor who shares the
batch decide what an episode gets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlm_agents.errors import ModelError
from vlm_agents.models.actor_critic import Agent, entropy_of
from vlm_agents.models.batch import position_axes
from vlm_agents.models.cache import Beginning, Chats, RoomyLayer, beginning, keys_of, states_of
from vlm_agents.models.drafts import CONTEXT, NONE, Drafts
from vlm_agents.models.prefix import causal_mask, shared_prefix
from vlm_agents.models.rendering import HFRenderer, Rendered
from vlm_agents.stopwatch import Stopwatch
from vlm_agents.types import Prompt, Reply, Sampling

COMPACT_BELOW = 0.75  # share of live rows under which the finished ones are moved out of the cache
DRAFT = 16  # the longest draft
OVERHEAD = {"cpu": 4.0, "cuda": 64.0}  # what a pass costs whatever it reads, in tokens of each row


@dataclass(slots=True)
class Prefilled:
    """A batch that is ready to decode. Columns are each row's tokens, right-padded."""

    rendered: list[Rendered]
    cache: Cache
    layers: list[RoomyLayer]  # of the cache
    hidden: Tensor  # [N H] state of each row's last prompt token
    lengths: Tensor  # [N] of the prompts
    positions: Tensor  # [P N] position of each row's next token


@dataclass(slots=True)
class Sampled:
    """What [n w] places of a batch's replies were sampled to be, each as if all before it were so."""

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray


class Replies:
    """The replies of a batch as they grow."""

    def __init__(self, count: int, sampling: Sampling, renderer: HFRenderer) -> None:
        self.tokens = np.zeros((count, sampling.max_tokens), dtype=np.int64)
        self.logprobs, self.entropies = (np.zeros(self.tokens.shape, dtype=np.float32) for _ in range(2))
        # `ended` by the model, and `done` too for want of room
        self.lengths, self.ended, self.done = np.zeros(count, dtype=np.int64), *np.zeros((2, count), dtype=bool)
        self._end, self._texts = renderer.end_of_turn, StopTexts(renderer, sampling.stop)

    def take(self, rows: np.ndarray, drafts: np.ndarray, sampled: Sampled) -> None:
        """Of [n w+1] sampled tokens of `rows` [n], those that follow on the right ones of [n w] drafts, up to an end.

        ModelError where the model gives no numbers: then what was sampled may be no token at all.
        """
        follows = np.cumprod((drafts == sampled.tokens[:, :-1]) & (drafts != self._end), axis=1)
        index, place = np.nonzero(np.pad(follows, ((0, 0), (1, 0)), constant_values=1))
        if np.isnan(sampled.entropies[index, place]).any():
            raise ModelError("the model's logits aren't finite: its weights are broken, as by a learning rate too high")
        where = rows[index], self.lengths[rows[index]] + place
        self.tokens[where], self.logprobs[where] = sampled.tokens[index, place], sampled.logprobs[index, place]
        self.entropies[where] = sampled.entropies[index, place]
        before = self.lengths[rows]
        self.lengths[rows] += 1 + follows.sum(1)
        for row, start in zip(rows, before, strict=True) if self._texts.texts else ():
            if (end := self._texts.end(self.said(row), int(start))) is not None:
                self.lengths[row], self.ended[row] = end, True
        self.ended[rows] |= self.tokens[rows, self.lengths[rows] - 1] == self._end
        self.done[rows] = self.ended[rows] | (self.lengths[rows] == self.tokens.shape[1])

    def said(self, row: int) -> list[int]:
        return self.tokens[row, : self.lengths[row]].tolist()

    def last(self, rows: np.ndarray, count: int) -> np.ndarray:
        """[n count] the last tokens of `rows` [n], NONE before the first."""
        places = self.lengths[rows, None] + np.arange(-count, 0)
        return np.where(places < 0, NONE, self.tokens[rows[:, None], places.clip(min=0)])


class HFSampler:
    """Implements policies.Sampler with the agent's own weights."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.renderer = agent, agent.renderer
        self.drafts = Drafts(DRAFT, OVERHEAD.get(agent.device.type, OVERHEAD["cuda"]))
        self.chats = Chats()
        self.stopwatch = Stopwatch()  # `prefill` and `decode`

    def sync(self) -> None:
        self.agent.images.clear()
        self.drafts.clear()
        self.chats.clear()

    @contextmanager
    def synced(self) -> Iterator[None]:
        """For as long as these weights play. Chats go on no further then: their memory is free for an update."""
        self.sync()
        try:
            yield
        finally:
            self.chats.clear()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
    ) -> list[Reply]:
        """One reply a prompt. Greedy replies still carry the log-probs of the policy at its own temperature."""
        room = sampling.max_tokens
        with self.stopwatch.phase("prefill"):
            batch = self.prefill(prompts, room)
            self.chats.clear()  # what is known of them is in the batch
            values = self.agent.value(batch.hidden).tolist()
        draws = None if sampling.greedy else np.stack([rng.random(room) for rng in rngs])
        with self.stopwatch.phase("decode"):
            replies = self._decode(batch, draws, sampling)
        for row in range(len(prompts)):
            self.drafts.learn(replies.said(row))
        return [
            self._reply(rendered, replies, row, value)
            for row, (rendered, value) in enumerate(zip(batch.rendered, values, strict=True))
        ]

    def _decode(self, batch: Prefilled, draws: np.ndarray | None, sampling: Sampling) -> Replies:
        """Whole replies, of [n w] random numbers where they aren't to be the likeliest."""
        count = len(batch.rendered)
        temperatures = self.agent.temperatures(batch.hidden)
        replies = Replies(count, sampling, self.renderer)
        rows = live = np.arange(count)  # which prompts are in the cache, and which of its rows go on
        hidden, drafts = batch.hidden[:, None], np.empty((count, 0), dtype=np.int64)
        while len(live):
            asked = rows[live]
            places = replies.lengths[asked, None] + np.arange(hidden.shape[1])
            uniform = None if draws is None else draws[asked[:, None], places]
            replies.take(asked, drafts[live], self._sample(hidden[live], temperatures[asked], uniform))
            if sampling.continued:
                for place in live[replies.done[asked]]:
                    self._remember(batch, replies, int(rows[place]), int(place))
            live = np.flatnonzero(~replies.done[rows])
            if 0 < len(live) < COMPACT_BELOW * len(rows):
                for layer in batch.layers:
                    layer.keep(torch.from_numpy(live).to(self.agent.device))
                rows, live = rows[live], np.arange(len(live))
            if len(live):
                drafts = self._drafts(replies, rows, live)
                hidden = self._read(batch, replies, rows, drafts)
        return replies

    @torch.no_grad()
    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        """The critic's estimate for each prompt."""
        with self.stopwatch.phase("prefill"):
            return self.values_of([self.renderer.render(prompt) for prompt in prompts])

    @torch.no_grad()
    def values_of(self, rows: Sequence[Rendered]) -> list[float]:
        """The same of prompts that are tokens already."""
        return self.agent.value(self._prefill(rows, 0).hidden).tolist() if rows else []

    def _sample(self, hidden: Tensor, temperatures: Tensor, uniform: np.ndarray | None) -> Sampled:
        """From [n w H] states of rows at [n] temperatures, by [n w] uniform numbers; None: the likeliest tokens."""
        agent, shape = self.agent, hidden.shape[:2]
        each = temperatures[:, None].expand(shape).flatten()
        distribution = agent.log_distribution(agent.logits(hidden.flatten(0, 1)), each)
        if uniform is None:
            chosen = distribution.argmax(-1)
        else:
            chosen = draw(distribution, torch.from_numpy(uniform).to(agent.device).flatten())
        logprobs = distribution.gather(-1, chosen.clamp(max=distribution.shape[-1] - 1)[:, None]).squeeze(-1)
        found = (chosen, logprobs, entropy_of(distribution))
        return Sampled(*(tensor.view(shape).cpu().numpy() for tensor in found))

    def _drafts(self, replies: Replies, rows: np.ndarray, live: np.ndarray) -> np.ndarray:
        """[n w] of the rows in the cache, of which those that are done have none."""
        room = replies.tokens.shape[1] - 1 - int(replies.lengths[rows[live]].max())
        guessed = self.drafts.guess(replies.last(rows[live], CONTEXT), room)
        drafts = np.full((len(rows), guessed.shape[1]), NONE)
        drafts[live] = guessed
        return drafts

    def _read(self, batch: Prefilled, replies: Replies, rows: np.ndarray, drafts: np.ndarray) -> Tensor:
        """[n w+1 H] states after each row's last token, and after each of its [n w] drafted ones."""
        agent, width = self.agent, drafts.shape[1]
        before = np.minimum(replies.lengths[rows] - 1, replies.tokens.shape[1] - 1 - width)  # less: of those done
        read = np.concatenate([replies.tokens[rows, before][:, None], drafts.clip(min=0)], axis=1)
        steps = torch.from_numpy(before[:, None] + np.arange(width + 1)).to(agent.device)
        output = agent.family.text(
            inputs_embeds=agent.family.embed_tokens(torch.from_numpy(read).to(agent.device)),
            position_ids=(batch.positions[:, rows, None] + steps).squeeze(0),
            attention_mask=self._place(batch.layers, batch.lengths[rows, None] + steps),
            **agent.family.caching(batch.cache),
        )
        return output.last_hidden_state

    def _place(self, layers: Sequence[RoomyLayer], places: Tensor) -> Tensor:
        """The mask of a pass whose tokens go to these [n w] columns of the rows: each sees what stands up to itself."""
        columns = int(places.max()) + 1
        for layer in layers:
            layer.places, layer.length = places, columns
        seen = torch.arange(columns, device=places.device) <= places[..., None]
        return self.agent.attention_mask(seen[:, None])

    def prefill(self, prompts: Sequence[Prompt], room: int) -> Prefilled:
        """Run the prompts through the model, equal ones once, leaving `room` columns for tokens to come."""
        return self._prefill([self.renderer.render(prompt) for prompt in prompts], room)

    def _prefill(self, every: Sequence[Rendered], room: int) -> Prefilled:
        keys = [(row.ids.tobytes(), keys_of(row)) for row in every]
        distinct = dict(zip(keys, every, strict=True))
        rows = list(distinct.values())
        read = self._read_rows(rows, self._known(rows), room)
        if len(rows) == len(every):
            return read
        place = {key: index for index, key in enumerate(distinct)}
        which = torch.tensor([place[key] for key in keys], device=self.agent.device)
        for layer in read.layers:
            layer.keep(which)
        picked = read.hidden[which], read.lengths[which], read.positions[:, which]
        return Prefilled(list(every), read.cache, read.layers, *picked)

    def _known(self, rows: Sequence[Rendered]) -> Sequence[Beginning | None]:
        """What needn't be read of each of these rows: of chats that go on, or what all of them share.

        Where some go on, the others are read up to their last token here, not beside the little that is new of those.
        """
        found = self.chats.find(rows)
        new = [index for index, one in enumerate(found) if one is None]
        if not new:
            return found
        if len(new) < len(rows):
            openings = [Rendered(rows[index].ids[:-1], rows[index].images) for index in new]
            layers = self._read_rows(openings, self._known(openings), 0).layers
            for place, (index, row) in enumerate(zip(new, openings, strict=True)):
                found[index] = Beginning(row.ids, keys_of(row), beginning(layers, place, len(row.ids)))
            return found
        ids = [row.ids for row in rows]
        if not (shared := shared_prefix(ids, self.agent.family.image_token_id, max(map(len, ids)))):
            return found
        prefix = ids[0][:shared]
        inputs = prefix[None], self.agent.family.positions(prefix, [])[:, None]
        _, cache = self.agent.run_prefix(*(torch.from_numpy(one).to(self.agent.device) for one in inputs))
        return [Beginning(prefix, (), states_of(cache))] * len(rows)

    def _read_rows(self, rows: Sequence[Rendered], known: Sequence[Beginning | None], room: int) -> Prefilled:
        """Run what isn't known of the rows through the model."""
        agent, family, count = self.agent, self.agent.family, len(rows)
        starts = np.array([0 if one is None else len(one.ids) for one in known])
        lengths = np.array([len(row.ids) for row in rows])
        width = int((lengths - starts).max())
        ids = torch.full((count, width), agent.tokenizer.pad_token_id)
        positions = torch.zeros(position_axes(family), count, width, dtype=torch.long)
        for index, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
            ids[index, : length - start] = torch.from_numpy(row.ids[start:])
            whole = family.positions(row.ids, [image.size for image in row.images])
            positions[:, index, : length - start] = torch.from_numpy(whole[:, start:])
        ids, positions = ids.to(agent.device), positions.to(agent.device)
        layers = self._layers(known, int(max(starts.max() + width, lengths.max() + room)))
        cache = Cache(layers=list(layers))
        mask = None  # what is behind a row's end isn't seen by what stands before it
        if (starts != starts[0]).any():
            mask = self._place(layers, torch.from_numpy(starts[:, None] + np.arange(width)).to(agent.device))
        elif starts[0]:
            mask = agent.attention_mask(causal_mask(width, starts[0] + width, agent.device))
        seen = [0 if one is None else len(one.pictures) for one in known]
        new = [image for row, skipped in zip(rows, seen, strict=True) for image in row.images[skipped:]]
        hidden = family.text(
            **agent.embed(ids, new),
            position_ids=positions.squeeze(0),
            attention_mask=mask,
            **family.caching(cache),
        ).last_hidden_state
        ends = torch.from_numpy(lengths - starts - 1).to(agent.device)
        last = hidden[torch.arange(count, device=agent.device), ends]
        following = positions.amax(-1).amax(0).expand(positions.shape[:2]) + 1  # the next token's, on all rotary axes
        return Prefilled(list(rows), cache, layers, last, torch.from_numpy(lengths).to(agent.device), following)

    def _layers(self, known: Sequence[Beginning | None], capacity: int) -> list[RoomyLayer]:
        """Of a batch's cache, as it is before the batch is read."""
        alike = known[:1] if all(one is known[0] for one in known) else known
        layers = [
            RoomyLayer(len(known), capacity, [None if one is None else one.layers[index] for one in alike])
            for index in range(self.agent.family.text.config.num_hidden_layers)
        ]
        for layer in layers:
            layer.length = 0 if known[0] is None else len(known[0].ids)
        return layers

    def _remember(self, batch: Prefilled, replies: Replies, row: int, place: int) -> None:
        """The chat up to the last token of a reply, which was sampled and not read, from its place in the cache."""
        rendered, said = batch.rendered[row], replies.said(row)[:-1]
        ids = np.concatenate([rendered.ids, np.array(said, dtype=np.int64)])
        self.chats.add(Beginning(ids, keys_of(rendered), beginning(batch.layers, place, len(ids))))

    def _reply(self, rendered: Rendered, replies: Replies, row: int, value: float) -> Reply:
        ids, length = replies.said(row), replies.lengths[row]
        return Reply(
            text=self.renderer.decode(ids),
            prompt_token_ids=tuple(rendered.ids.tolist()),
            token_ids=tuple(ids),
            logprobs=tuple(replies.logprobs[row, :length].tolist()),
            value=value,
            entropy=float(replies.entropies[row, :length].mean()),
            finish="stop" if replies.ended[row] else "length",
        )


class StopTexts:
    """Finds where one of the texts that end a reply has been written."""

    def __init__(self, renderer: HFRenderer, texts: Sequence[str]) -> None:
        self.renderer, self.texts = renderer, texts
        # each token writes a byte at least, but for one before the text whose space the decoder drops
        self.longest = max((len(text.encode()) + 1 for text in texts), default=0)

    def end(self, said: Sequence[int], start: int) -> int | None:
        """The number of tokens up to where one is first whole, of those that end behind the first `start` tokens."""
        for length in range(start + 1, len(said) + 1) if self.texts else ():
            tail = self.renderer.decode(said[max(0, length - self.longest) : length])
            if any(text in tail for text in self.texts):
                return length
        return None


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """[n] tokens by inverting the cumulative distribution of [n V] log-probs at `uniform` [n], doubles in [0, 1)."""
    cumulative = distribution.double().exp().cumsum(-1)
    # the largest double under 1 times the total is under the total after rounding too: no point is past the last token
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
