"""Keys and values: of a batch while it is sampled, and of chats until their next turn.

A chat that grows by a turn is read on from where the last reply ended. As long as the weights are the same, so are the
numbers that reading it anew would give, but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlm_agents.tensors import Rendered

States = tuple[Tensor, Tensor]  # keys and values [... H L D] of L tokens


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow, where each row goes on at its own place."""

    def __init__(self, rows: int, capacity: int, known: Sequence[States | None]) -> None:
        """`known` of each row, or of all rows alike: its first tokens."""
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.rows, self.capacity, self.known = rows, capacity, known
        self.length = 0  # columns in use
        self.places: Tensor | None = None  # [n w] where the next tokens of each row go; None: behind `length`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            state.new_zeros(self.rows, state.shape[1], self.capacity, state.shape[3])  # NaN counts even where unseen
            for state in (key_states, value_states)
        )
        each = self.rows // len(self.known)
        for keys, values, states in zip(self.keys.split(each), self.values.split(each), self.known, strict=True):
            if states is not None:
                length = states[0].shape[-2]
                keys[..., :length, :], values[..., :length, :] = states
        self.known = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places is None:
            start, self.length = self.length, self.length + key_states.shape[-2]
            self.keys[..., start : self.length, :] = key_states
            self.values[..., start : self.length, :] = value_states
        else:
            index = self.places[:, None, :, None].expand_as(key_states)
            self.keys.scatter_(2, index, key_states)
            self.values.scatter_(2, index, value_states)
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: Tensor) -> None:
        """These rows of the batch alone, any of them as often as it is asked for."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The first tokens and pictures of a row, and their keys and values in each layer."""

    ids: np.ndarray
    pictures: tuple[str, ...]  # their keys
    layers: Sequence[States]


def states_of(cache: DynamicCache) -> list[States]:
    """Those of a cache that was filled, in each layer."""
    found: list[States] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        found.append((layer.keys, layer.values))
    return found


def beginning(layers: Sequence[RoomyLayer], row: int, length: int) -> list[States]:
    """A copy of a row's first tokens, in each layer."""
    return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in layers]


def keys_of(row: Rendered) -> tuple[str, ...]:
    """Of its pictures."""
    return tuple(image.key for image in row.images)


class Chats:
    """The chats of one batch, for the batch that goes on with them."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, tuple[str, ...]], Beginning] = {}

    def clear(self) -> None:
        self._known.clear()

    def add(self, chat: Beginning) -> None:
        self._known[chat.ids.tobytes(), chat.pictures] = chat

    def find(self, rows: Sequence[Rendered]) -> list[Beginning | None]:
        """The longest known beginning of each of these rows."""
        sizes = sorted({(len(one.ids), len(one.pictures)) for one in self._known.values()}, reverse=True)
        return [self._find(row, sizes) for row in rows]

    def _find(self, row: Rendered, sizes: Sequence[tuple[int, int]]) -> Beginning | None:
        pictures = keys_of(row)
        shorter = ((row.ids[:length].tobytes(), pictures[:seen]) for length, seen in sizes if length < len(row.ids))
        return next((self._known[key] for key in shorter if key in self._known), None)
