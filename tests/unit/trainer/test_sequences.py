"""Masks and weights, by hand."""

from trainer.sequences import loss_mask, token_weights


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
