"""A key-value cache that grows in place: decoding appends one token at a time, and copying every key and
value for each is a seventh of a decode step's time."""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens reserved whenever more is needed than there is."""


class GrowingLayer(DynamicLayer):
    """`keys` and `values`, [rows, kv heads, tokens, d], are views of longer buffers."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < stop:
            assert self.keys is not None
            assert self.values is not None
            self._buffers = (
                self._longer(self.keys, key_states, stop),
                self._longer(self.values, value_states, stop),
            )
        keys, values = self._buffers
        keys[..., start:stop, :] = key_states
        values[..., start:stop, :] = value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._buffers = None

    @staticmethod
    def _longer(held: Tensor, added: Tensor, tokens: int) -> Tensor:
        buffer = torch.empty(
            (*added.shape[:-2], tokens + ROOM, added.shape[-1]), dtype=added.dtype, device=added.device
        )
        if held.numel():
            buffer[..., : held.shape[-2], :] = held
        return buffer


def growing_cache() -> Cache:
    """An empty cache; keeps every token, also of layers that look at a window only."""
    return Cache(layer_class_to_replicate=GrowingLayer)
