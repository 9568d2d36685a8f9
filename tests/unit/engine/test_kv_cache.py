"""Rows of the cache: kept dense, grown without loss, never above the budget."""

import pytest
import torch

from engine.kv_cache import CacheShape, KvCache, Slot

SHAPE = CacheShape(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def new_cache(rows: int = 8, length: int = 1024, budget: int = 2048) -> KvCache:
    return KvCache(SHAPE, max_rows=rows, max_length=length, budget_tokens=budget)


def fill(cache: KvCache, slot: Slot, value: float, length: int) -> None:
    slot.length = length
    for layer in range(2):
        for tensor in cache.layer(layer):
            tensor[slot.row, :, :length] = value


def holds(cache: KvCache, slot: Slot, value: float) -> bool:
    return all(
        tensor.shape[2] >= slot.length and bool((tensor[slot.row, :, : slot.length] == value).all())
        for layer in range(2)
        for tensor in cache.layer(layer)
    )


def test_bytes_per_token() -> None:
    # keys and values, 2 layers, 1 head, 2 numbers of 4 bytes
    assert SHAPE.bytes_per_token == 2 * 2 * 1 * 2 * 4


def test_growth_keeps_every_sequence() -> None:
    cache = new_cache()
    first, second = cache.add(), cache.add()
    cache.reserve(10)
    fill(cache, first, 1.0, 10)
    fill(cache, second, 2.0, 3)
    third = cache.add()
    cache.reserve(200)
    fill(cache, third, 3.0, 200)
    assert holds(cache, first, 1.0)
    assert holds(cache, second, 2.0)
    assert holds(cache, third, 3.0)


def test_exact_growth_at_the_budget_does_not_cut_a_longer_sequence() -> None:
    cache = new_cache(budget=1024)
    long = cache.add()
    cache.reserve(300)
    fill(cache, long, 1.0, 300)
    for _ in range(2):
        cache.add()
    cache.reserve(5)  # room for three rows is only there at their exact length
    assert cache.allocated_tokens <= 1024
    assert holds(cache, long, 1.0)


@pytest.mark.parametrize("steps", [[(1, 1), (8, 256)], [(8, 1), (8, 256)], [(2, 1000)], [(5, 400)]])
def test_budget_is_kept_whatever_grows_first(steps: list[tuple[int, int]]) -> None:
    cache = new_cache()
    for rows, length in steps:
        assert cache.fits(rows, length)
        while len(cache) < rows:
            cache.add()
        cache.reserve(length)
        assert cache.allocated_tokens <= 2048
        assert cache.layer(0)[0].shape[0] >= rows
        assert cache.layer(1)[1].shape[2] >= length


def test_growth_token_by_token_copies_seldom_at_the_budget_too() -> None:
    cache = new_cache(rows=8, length=1024, budget=2048)
    slots = [cache.add() for _ in range(3)]
    sizes = [cache.allocated_tokens]
    for length in range(1, 601):
        assert cache.fits(3, length)
        cache.reserve(length)
        for slot in slots:
            fill(cache, slot, float(slot.row + 1), length)
        if cache.allocated_tokens != sizes[-1]:
            sizes.append(cache.allocated_tokens)
    # 6 rows of 64, 128 and 256 tokens; 6 of 512 are above the budget, which gives 3 rows 2048 // 3 = 682
    assert sizes == [0, 6 * 64, 6 * 128, 6 * 256, 3 * 682]
    assert all(holds(cache, slot, float(slot.row + 1)) for slot in slots)


def test_rows_added_at_the_budget_keep_what_is_written() -> None:
    cache = new_cache(rows=8, length=1024, budget=1024)
    first = cache.add()
    cache.reserve(600)
    fill(cache, first, 1.0, 100)
    assert cache.allocated_tokens == 1024
    others = [cache.add() for _ in range(3)]
    cache.reserve(200)
    assert cache.allocated_tokens == 4 * 256
    for value, slot in enumerate(others, start=2):
        fill(cache, slot, float(value), 200)
    assert holds(cache, first, 1.0)
    assert all(holds(cache, slot, float(value)) for value, slot in enumerate(others, start=2))


def test_fits() -> None:
    cache = new_cache(rows=8, budget=2048)
    assert cache.fits(8, 256)
    assert not cache.fits(8, 257)
    assert not cache.fits(9, 1)


def test_removing_fills_the_gap_and_an_empty_cache_holds_nothing() -> None:
    cache = new_cache()
    slots = [cache.add() for _ in range(3)]
    cache.reserve(4)
    for value, slot in enumerate(slots):
        fill(cache, slot, float(value), 4)
    cache.remove(slots[0])
    assert (slots[1].row, slots[2].row) == (1, 0)
    assert holds(cache, slots[1], 1.0)
    assert holds(cache, slots[2], 2.0)
    cache.remove(slots[1])
    assert holds(cache, slots[2], 2.0)
    cache.remove(slots[2])
    assert cache.allocated_tokens == 0


def test_snapshot_begins_another_sequence() -> None:
    cache = new_cache()
    first = cache.add()
    cache.reserve(6)
    fill(cache, first, 5.0, 6)
    prefix = cache.snapshot(first, 4)
    fill(cache, first, 9.0, 6)
    second = cache.add()
    cache.restore(second, prefix, 3)
    assert second.length == 3
    assert holds(cache, second, 5.0)
    assert holds(cache, first, 9.0)


def test_budget_below_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="one sequence may need 1024"):
        new_cache(length=1024, budget=1023)


def test_a_freed_row_leaves_nothing_behind() -> None:
    """What is not finite would survive a mask, so a row's next owner must not find it."""
    cache = new_cache()
    long, short, other = (cache.add() for _ in range(3))
    cache.reserve(8)
    for slot, value, length in ((long, torch.nan, 8), (short, 2.0, 3), (other, torch.inf, 5)):
        fill(cache, slot, value, length)
    cache.remove(long)  # `other` moves to row 0, row 2 is free
    cache.remove(other)  # `short` moves to row 0, row 1 is free
    keys, values = cache.layer(0)
    for tensor in (keys, values):
        assert tensor.isfinite().all()
        assert (tensor[0, :, :3] == 2.0).all()
        assert tensor.sum() == 3 * 2 * 2.0
