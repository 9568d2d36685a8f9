"""Masks and weights, by hand."""

import pytest

from trainer.sequences import Training, loss_mask, token_weights


def test_first_tokens_are_skipped() -> None:
    assert loss_mask([5, 6, 7, 8], skip_first=3, truncated=False) == [False, False, False, True]


def test_a_truncated_response_counts_nowhere() -> None:
    assert loss_mask([5, 6, 7], skip_first=0, truncated=True) == [False, False, False]


def sequence(mask: list[bool], share: float = 1.0) -> Training:
    return Training([0], [0], 0, [7] * len(mask), False, None, mask, share=share)


def test_weights_are_mean_over_tokens_then_over_sequences() -> None:
    """Two counted sequences: two of three tokens at 1/(2*2), one at 1/(1*2); the masked one at 0."""
    weights = token_weights([sequence([False, True, True]), sequence([True]), sequence([False, False])])
    assert weights == [[0.0, 0.25, 0.25], [0.5], [0.0, 0.0]]


def test_samples_of_one_prompt_share_its_weight() -> None:
    """A demonstration beside four samples on another prompt, one of them cut off: 1 and 3 quarters in all."""
    samples = [sequence([True, True], 0.25)] * 3 + [sequence([False, False], 0.25)]
    weights = token_weights([sequence([True]), *samples])
    assert weights[0] == pytest.approx([1 / 1.75])
    assert weights[1:] == [pytest.approx([0.125 / 1.75] * 2)] * 3 + [[0.0, 0.0]]


def test_nothing_unmasked_weighs_nothing() -> None:
    assert token_weights([sequence([False]), sequence([])]) == [[0.0], []]
