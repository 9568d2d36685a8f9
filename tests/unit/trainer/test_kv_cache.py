"""The cache that grows in place holds what concatenation would, also after rows were repeated or dropped."""

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer.kv_cache import ROOM, growing_cache


def states(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 4, generator=generator), torch.randn(
        rows, 2, tokens, 4, generator=generator
    )


def test_equals_concatenation_through_growth_repetition_and_selection() -> None:
    ours, plain = growing_cache(), DynamicCache()

    def append(rows: int, tokens: int, seed: int) -> None:
        found = ours.update(*states(rows, tokens, seed), 0)
        expected = plain.update(*states(rows, tokens, seed), 0)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    append(1, 5, 0)
    for cache in (ours, plain):
        cache.batch_repeat_interleave(3)
    append(3, 2, 1)
    for seed in range(ROOM + 3):  # beyond the room reserved
        append(3, 1, 2 + seed)
    for cache in (ours, plain):
        cache.batch_select_indices(torch.tensor([2, 0]))
    append(2, 1, 100)
    assert ours.get_seq_length() == 5 + 2 + ROOM + 3 + 1


def test_appending_leaves_what_was_handed_out_before() -> None:
    """A view handed out keeps its length and values when later tokens are written beside it."""
    cache = growing_cache()
    keys, _ = cache.update(*states(1, 3, 0), 0)
    kept = keys.clone()
    cache.update(*states(1, 2, 1), 0)
    assert torch.equal(keys, kept)
    assert keys.shape == (1, 2, 3, 4)
