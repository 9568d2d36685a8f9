"""Masks, weights and grouping, by hand."""

import pytest

from trainer.sequences import loss_mask, micro_batches, token_weights


def test_first_tokens_are_skipped() -> None:
    assert loss_mask([5, 6, 7, 8], skip_first=3, truncated=False) == [False, False, False, True]


def test_a_truncated_response_counts_nowhere() -> None:
    assert loss_mask([5, 6, 7], skip_first=0, truncated=True) == [False, False, False]


def test_weights_are_mean_over_tokens_then_over_sequences() -> None:
    """Two counted sequences: two of three tokens at 1/(2*2), one at 1/(1*2); the masked one at 0."""
    weights = token_weights([[False, True, True], [True], [False, False]])
    assert weights == [[0.0, 0.25, 0.25], [0.5], [0.0, 0.0]]


def test_nothing_unmasked_weighs_nothing() -> None:
    assert token_weights([[False], []]) == [[0.0], []]


def test_groups_hold_similar_lengths_and_respect_the_limit() -> None:
    groups = micro_batches([10, 50, 11, 12, 13, 52], limit=120)
    assert groups == [[0, 2, 3, 4], [1, 5]]


def test_a_sequence_above_the_limit_stands_alone() -> None:
    assert micro_batches([5, 300], limit=100) == [[0], [1]]


@pytest.mark.parametrize("limit", [64, 200])
def test_every_sequence_is_in_exactly_one_group(limit: int) -> None:
    lengths = [7, 33, 20, 61, 20, 5, 48]
    groups = micro_batches(lengths, limit)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(len(group) * max(lengths[i] for i in group) <= limit for group in groups)
