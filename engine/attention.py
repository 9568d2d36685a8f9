"""Attention over a packed step: the tokens of many sequences in one row, none seeing another's.

The model runs on [1, tokens]: first one token of every decoding sequence, then the prompt chunks of
the others. This function, registered with transformers under NAME, writes the new keys and values to
each sequence's own row of the cache and lets every token attend to its own row only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.kv_cache import KvCache, Slot

if TYPE_CHECKING:
    from engine.lora import AdapterRows

NAME = "engine_packed"


@dataclass(frozen=True, eq=False)
class Chunk:
    """New tokens of one sequence in a step."""

    slot: Slot
    tokens: list[int]

    @property
    def past(self) -> int:
        return self.slot.length


@dataclass(eq=False)
class Step:
    """One forward pass: `decode` chunks (one token each) then `prefill` chunks, packed in that order."""

    cache: KvCache
    decode: list[Chunk]
    prefill: list[Chunk]
    adapters: list["AdapterRows"]
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.cache.shape.device
        chunks = [*self.decode, *self.prefill]
        self.cache.reserve(max(chunk.past + len(chunk.tokens) for chunk in chunks))
        rows = [chunk.slot.row for chunk in chunks for _ in chunk.tokens]
        columns = [chunk.past + i for chunk in chunks for i in range(len(chunk.tokens))]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        self.rows = torch.tensor(rows, device=device)
        self.columns = torch.tensor(columns, device=device)
        self.tokens = torch.tensor(tokens, device=device).unsqueeze(0)
        decoding = rows[: len(self.decode)]
        self.decode_is_dense = decoding == list(range(len(decoding)))
        self.decode_length = max((chunk.past + 1 for chunk in self.decode), default=0)

    def decode_mask(self, window: int | None) -> torch.Tensor | None:
        """[decoding, 1, 1, decode_length], true where a token may look; None when everywhere."""
        key = (-1, window)
        if key not in self._masks:
            at = self.columns[: len(self.decode), None]
            columns = torch.arange(self.decode_length, device=at.device)
            mask = columns <= at
            if window is not None:
                mask &= columns > at - window
            self._masks[key] = None if bool(mask.all()) else mask[:, None, None, :]
        return self._masks[key]

    def prefill_mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """[new, past + new] of one prefill chunk; None when plain causal without a past."""
        key = (index, window)
        if key not in self._masks:
            chunk = self.prefill[index]
            new, total = len(chunk.tokens), chunk.past + len(chunk.tokens)
            if chunk.past == 0 and (window is None or total <= window):
                self._masks[key] = None
            else:
                at = torch.arange(chunk.past, total, device=self.rows.device)[:, None]
                columns = torch.arange(total, device=self.rows.device)
                mask = columns <= at
                if window is not None:
                    mask &= columns > at - window
                assert mask.shape == (new, total)
                self._masks[key] = mask
        return self._masks[key]

    def advance(self) -> None:
        """After the forward pass: the new tokens are in the cache."""
        for chunk in (*self.decode, *self.prefill):
            chunk.slot.length += len(chunk.tokens)


_STEP: ContextVar[Step] = ContextVar("engine_step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention and adapters of this thread work on."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def current_step() -> Step:
    return _STEP.get()


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, heads, tokens, head_dim], key and value with kv_heads.

    Raises NotImplementedError for logit soft-capping and attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("soft-capped attention and attention sinks are not supported")
    step = current_step()
    keys, values = step.cache.layer(int(module.layer_idx))  # type: ignore[arg-type]
    keys[step.rows, :, step.columns] = key[0].transpose(0, 1)
    values[step.rows, :, step.columns] = value[0].transpose(0, 1)

    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    output = query.new_empty(query.shape[2], heads, head_dim)
    count = len(step.decode)
    if count:
        if step.decode_is_dense:
            seen_keys = keys[:count, :, : step.decode_length]
            seen_values = values[:count, :, : step.decode_length]
        else:
            seen_keys = keys[step.rows[:count], :, : step.decode_length]
            seen_values = values[step.rows[:count], :, : step.decode_length]
        # The query heads that share a key head stand in the place of query positions: no copy of keys.
        grouped = query[0, :, :count].transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, head_dim)
        attended = scaled_dot_product_attention(
            grouped, seen_keys, seen_values, attn_mask=step.decode_mask(sliding_window), scale=scaling
        )
        output[:count] = attended.reshape(count, heads, head_dim)
    start = count
    for index, chunk in enumerate(step.prefill):
        end = start + len(chunk.tokens)
        mask = step.prefill_mask(index, sliding_window)
        if chunk.past == 0:
            seen_keys, seen_values = key[:, :, start:end], value[:, :, start:end]
        else:
            row, total = chunk.slot.row, chunk.past + len(chunk.tokens)
            seen_keys, seen_values = keys[row : row + 1, :, :total], values[row : row + 1, :, :total]
        attended = scaled_dot_product_attention(
            query[:, :, start:end],
            seen_keys,
            seen_values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=heads != kv_heads,
        )
        output[start:end] = attended[0].transpose(0, 1)
        start = end
    return output.unsqueeze(0), None


def register() -> None:
    """Make NAME known to transformers. No mask function: masks are made here."""
    AttentionInterface.register(NAME, _packed_attention)
