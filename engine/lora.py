"""Several adapters in one forward pass: each adds its low-rank change to its own rows only.

A forward hook on every linear layer of the base adds, for each adapter in the step,
delta = (x A^T) (scaling * B)^T to the rows of that adapter's sequences. Rows of the base get nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from engine.attention import current_step


@dataclass(frozen=True, eq=False)
class LoraPair:
    """Weights of one layer in the model's dtype: `down` [rank, in], `up` [out, rank], scaling included."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in memory. A request holds its adapter, so that unloading the name lets the
    request finish; the memory goes with the last holder."""

    name: str
    path: str
    rank: int
    pairs: dict[str, LoraPair]
    """By the layer's name in the base model, e.g. `model.layers.0.self_attn.q_proj`."""
    created: int
    """Unix seconds."""


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """The rows of the packed step that one adapter changes; None means all of them."""

    adapter: Adapter
    rows: slice | torch.Tensor | None


def rows_by_adapter(owners: Sequence[tuple[Adapter | None, int]], device: torch.device) -> list[AdapterRows]:
    """Group packed rows. `owners` are (adapter, number of rows) in packed order."""
    ranges: dict[int, list[range]] = {}
    adapters: dict[int, Adapter] = {}
    start = 0
    for adapter, count in owners:
        if adapter is not None:
            adapters[id(adapter)] = adapter
            spans = ranges.setdefault(id(adapter), [])
            if spans and spans[-1].stop == start:
                spans[-1] = range(spans[-1].start, start + count)
            else:
                spans.append(range(start, start + count))
        start += count
    grouped = []
    for key, spans in ranges.items():
        rows: slice | torch.Tensor | None
        if len(spans) > 1:
            rows = torch.tensor([row for span in spans for row in span], device=device)
        elif len(spans[0]) == start:
            rows = None
        else:
            rows = slice(spans[0].start, spans[0].stop)
        grouped.append(AdapterRows(adapters[key], rows))
    return grouped


def target_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers that an adapter may change: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def install(model: PreTrainedModel) -> None:
    """Hook every layer that an adapter may change. The model is otherwise left as it is."""
    for name, layer in target_layers(model).items():
        layer.register_forward_hook(_AddChange(name))


class _AddChange:
    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __call__(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """`inputs[0]` is [1, tokens, in], `output` [1, tokens, out], changed in place."""
        for group in current_step().adapters:
            pair = group.adapter.pairs.get(self._layer)
            if pair is None:
                continue
            x, y = inputs[0][0], output[0]
            if group.rows is None:
                y.addmm_(x @ pair.down.T, pair.up.T)
            elif isinstance(group.rows, slice):
                y[group.rows].addmm_(x[group.rows] @ pair.down.T, pair.up.T)
            else:
                y.index_add_(0, group.rows, (x[group.rows] @ pair.down.T) @ pair.up.T)
