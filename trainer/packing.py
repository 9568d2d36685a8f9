"""Sequences that begin alike, laid out as a tree, so that what they share is computed once.

Prompts of one skill share the system message and the instruction, often most of their tokens. A pack holds
each distinct beginning once; a mask lets every token see its own sequence alone, and its position is its
place in that sequence, so states and gradients are those of the separate sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PACK_TOKENS = 192
"""Tokens of a pack, unless one sequence is longer: a pack's attention is dense."""
BATCH_TOKENS = 1024
"""Padded tokens in one forward pass with gradients: bounds activation memory. Twice as many save a twentieth
of the time on a CPU and take two thirds more memory."""


@dataclass(frozen=True)
class PackedBatch:
    """Packs that run in one forward pass, R of them, padded to L tokens."""

    ids: Tensor
    """[R, L]."""
    positions: Tensor
    """[R, L]."""
    mask: Tensor | None
    """[R, 1, L, L], True where the row's token sees the column's; None where causality says the same."""
    places: dict[int, tuple[int, list[int]]]
    """For each sequence its row and the columns of its tokens in order."""


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    count = 0
    for ours, its in zip(one, other, strict=False):
        if ours != its:
            break
        count += 1
    return count


class _Pack:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.paths: dict[int, list[int]] = {}
        self._last: tuple[list[int], list[int]] = ([], [])

    def shared(self, sequence: list[int]) -> int:
        """Tokens that `sequence` begins with like the last one added; in sorted order no other shares
        more."""
        return common_beginning(self._last[0], sequence)

    def add(self, index: int, sequence: list[int], shared: int) -> None:
        path = self._last[1][:shared] + list(
            range(len(self.tokens), len(self.tokens) + len(sequence) - shared)
        )
        self.tokens += sequence[shared:]
        self.positions += range(shared, len(sequence))
        self.paths[index] = path
        self._last = (sequence, path)

    @property
    def is_chain(self) -> bool:
        return all(path == list(range(len(path))) for path in self.paths.values())


def pack(sequences: Sequence[list[int]], *, share: bool) -> list[PackedBatch]:
    """Every sequence in one batch; without `share` each stands in a row of its own."""
    if not sequences:
        return []
    longest = max(map(len, sequences))
    limit = max(PACK_TOKENS, 2 * longest) if share else 0
    packs: list[_Pack] = []
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[index]
        shared = packs[-1].shared(sequence) if packs and share else 0
        if not packs or len(packs[-1].tokens) + len(sequence) - shared > limit:
            packs.append(_Pack())
            shared = 0
        packs[-1].add(index, sequence, shared)
    return [_batch(group) for group in _group(packs)]


def _group(packs: list[_Pack]) -> list[list[_Pack]]:
    """Packs of similar length, at most BATCH_TOKENS padded tokens a group (or one pack)."""
    groups: list[list[_Pack]] = []
    for one in sorted(packs, key=lambda pack: len(pack.tokens)):
        # Sorted upwards, so this pack is the longest of its group and every row is padded to it.
        group = groups[-1] if groups else None
        uneven = group is not None and len(group[0].tokens) * 1.5 < len(one.tokens) and len(group) >= 4
        if group is None or uneven or (len(group) + 1) * len(one.tokens) > BATCH_TOKENS:
            groups.append([one])
        else:
            group.append(one)
    return groups


def _batch(packs: list[_Pack]) -> PackedBatch:
    rows, length = len(packs), max(len(pack.tokens) for pack in packs)
    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.zeros(rows, length, dtype=torch.long)
    causal = all(pack.is_chain for pack in packs)
    # Padding sees itself, so that no row of the softmax is empty.
    mask = None if causal else torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1, 1)
    places: dict[int, tuple[int, list[int]]] = {}
    for row, one in enumerate(packs):
        ids[row, : len(one.tokens)] = torch.tensor(one.tokens)
        positions[row, : len(one.tokens)] = torch.tensor(one.positions)
        for index, path in one.paths.items():
            places[index] = (row, path)
            if mask is not None:
                columns = torch.tensor(path)
                seen = torch.ones(len(path), len(path), dtype=torch.bool).tril()
                mask[row, 0, columns[:, None], columns] |= seen
    return PackedBatch(ids, positions, mask, places)


@torch.no_grad()
def sharing_is_exact(run: Callable[[PackedBatch], Tensor]) -> bool:
    """Whether a model sees sequences in a pack as it sees them alone; `run` gives states [R, L, hidden].

    True for full attention with positions taken from position ids; recurrent layers, for one, are not so.
    """
    sequences = [[5, 6, 7, 8], [5, 6, 9]]
    (packed,) = pack(sequences, share=True)
    (alone,) = pack(sequences, share=False)
    together, apart = run(packed).float(), run(alone).float()
    for index in range(len(sequences)):
        row, columns = packed.places[index]
        expected = apart[alone.places[index][0], : len(columns)]
        if (together[row, columns] - expected).abs().max() > 0.05 * expected.abs().max():
            return False
    return True
