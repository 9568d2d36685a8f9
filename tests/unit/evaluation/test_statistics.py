"""Intervals and tests against the shared worked values and by hand."""

import pytest

from evaluation.statistics import mcnemar_exact, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 20, 0.0, 0.161125),
        (5, 20, 0.111862, 0.468701),
        (50, 100, 0.403832, 0.596168),
        (95, 100, 0.88825, 0.978456),
        (140, 150, 0.881638, 0.963388),
        (200, 200, 0.981155, 1.0),
    ],
)
def test_wilson(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-6)


def test_nothing_measured_tells_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("b", "c", "two_sided", "one_sided"),
    [
        (10, 2, 0.03857422, 0.01928711),
        (6, 6, 1.0, 0.61279297),
        (0, 5, 0.0625, 1.0),
        (25, 10, 0.01667385, 0.00833692),
        (0, 0, 1.0, 1.0),
        (1, 7, 0.0703125, 0.99609375),
    ],
)
def test_mcnemar(b: int, c: int, two_sided: float, one_sided: float) -> None:
    assert mcnemar_exact(b, c) == pytest.approx((two_sided, one_sided), abs=1e-7)
