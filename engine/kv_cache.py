"""Keys and values of the running sequences: one row per sequence, rows kept dense.

Per layer two tensors [rows, kv_heads, length, head_dim]. They grow with what is running and never
beyond the budget, which admission guarantees (`fits`). Rows stay dense (a removed row is filled with
the last one), so that decoding attends to a view instead of a copy.
"""

from dataclasses import dataclass

import torch

_LENGTH_STEP = 64


@dataclass(frozen=True)
class CacheShape:
    """What one token costs."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False)
class Slot:
    """A sequence's place in the cache. `row` changes when rows are made dense."""

    row: int
    length: int
    """Tokens whose keys and values are written."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A copy of a sequence's first keys and values, [2, kv_heads, length, head_dim] per layer."""

    layers: list[torch.Tensor]
    length: int


class KvCache:
    """Not thread-safe: only the scheduler's thread touches it."""

    def __init__(self, shape: CacheShape, *, max_rows: int, max_length: int, budget_tokens: int) -> None:
        if budget_tokens < max_length:
            raise ValueError(f"the cache holds {budget_tokens} tokens, one sequence may need {max_length}")
        self.shape = shape
        self.max_rows = max_rows
        self.max_length = max_length
        self.budget_tokens = budget_tokens
        self._slots: list[Slot] = []
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows = 0
        self._length = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def allocated_tokens(self) -> int:
        """Tokens that the tensors have room for."""
        return self._rows * self._length

    def fits(self, rows: int, length: int) -> bool:
        """Whether `rows` sequences of up to `length` tokens each stay within the budget."""
        return rows <= self.max_rows and rows * length <= self.budget_tokens

    def add(self) -> Slot:
        slot = Slot(row=len(self._slots), length=0)
        self._slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        """Free the row; the last row moves into it. An empty cache gives its memory back."""
        last = self._slots.pop()
        if not self._slots:
            self._keys, self._values = [], []
            self._rows = self._length = 0
            return
        vacated, used = last.row, last.length
        for tensor in (*self._keys, *self._values):
            if last is not slot:
                tensor[slot.row, :, :used] = tensor[vacated, :, :used]
                tensor[slot.row, :, used : slot.length] = 0
            # Decoding reads masked columns: what is not finite there would survive the mask.
            tensor[vacated, :, :used] = 0
        if last is not slot:
            self._slots[slot.row] = last
            last.row = slot.row

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every row in use. Admission has asked `fits` before.

        Doubles where the budget allows and else takes all of it, so that growth token by token copies
        seldom.
        """
        rows_needed = len(self._slots)
        length = max(length, *(slot.length for slot in self._slots))
        if rows_needed <= self._rows and length <= self._length:
            return
        rows = max(rows_needed, self._rows)
        tokens = max(length, self._length)
        roomy_rows = rows if rows_needed <= self._rows else min(self.max_rows, 2 * rows)
        roomy_tokens = -(-tokens // _LENGTH_STEP) * _LENGTH_STEP
        if length > self._length:
            roomy_tokens = max(roomy_tokens, 2 * self._length)
        roomy_tokens = min(self.max_length, roomy_tokens)
        if roomy_rows * roomy_tokens <= self.budget_tokens:
            self._resize(roomy_rows, roomy_tokens)
        else:
            self._resize(rows_needed, min(self.max_length, self.budget_tokens // rows_needed))

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [rows, kv_heads, length, head_dim]."""
        return self._keys[index], self._values[index]

    def snapshot(self, slot: Slot, length: int) -> Prefix:
        """Copy the first `length` tokens of a sequence."""
        layers = [
            torch.stack((keys[slot.row, :, :length], values[slot.row, :, :length]))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        return Prefix(layers=layers, length=length)

    def restore(self, slot: Slot, prefix: Prefix, length: int) -> None:
        """Begin a sequence with the first `length` tokens of a snapshot."""
        self.reserve(length)
        for keys, values, saved in zip(self._keys, self._values, prefix.layers, strict=True):
            keys[slot.row, :, :length] = saved[0, :, :length]
            values[slot.row, :, :length] = saved[1, :, :length]
        slot.length = length

    def _resize(self, rows: int, length: int) -> None:
        kept = min(length, self._length)
        old_rows = min(rows, self._rows)
        self._keys = self._moved(self._keys, rows, length, old_rows, kept)
        self._values = self._moved(self._values, rows, length, old_rows, kept)
        self._rows, self._length = rows, length

    def _moved(
        self, old: list[torch.Tensor], rows: int, length: int, old_rows: int, kept: int
    ) -> list[torch.Tensor]:
        shape = (rows, self.shape.kv_heads, length, self.shape.head_dim)
        moved = []
        for index in range(self.shape.layers):
            tensor = torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)
            if old:
                tensor[:old_rows, :, :kept] = old[index][:old_rows, :, :kept]
            moved.append(tensor)
        return moved
