"""Intervals and tests against the shared worked values and by hand."""

import math

import pytest

from evaluation.statistics import cautious_difference, mcnemar_exact, paired_difference, wilson


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


def changes(n: int, regressions: int, gains: int) -> list[float]:
    return [-1.0] * regressions + [1.0] * gains + [0.0] * (n - regressions - gains)


def test_paired_difference_as_worked_out() -> None:
    assert paired_difference(changes(200, 10, 2)) == pytest.approx(
        (-0.04, -0.07357654122453675, -0.006423458775463263), abs=1e-6
    )
    assert paired_difference(changes(400, 25, 10)) == pytest.approx(
        (-0.0375, -0.06629091291825714, -0.008709087081742846), abs=1e-6
    )


def test_cautious_difference_by_hand() -> None:
    # 4 items, 2 better: with +1 and -1 added: 1 1 0 0 1 -1, mean 1/3, sum of squares 4,
    # variance (4 - 6/9) / 5 = 2/3, standard error sqrt((2/3) / 6) = 1/3.
    mean, low, high = cautious_difference([1.0, 1.0, 0.0, 0.0])
    assert mean == 0.5
    assert low == pytest.approx(1 / 3 - 1.959964 / 3, abs=1e-6)
    assert high == pytest.approx(1 / 3 + 1.959964 / 3, abs=1e-6)


def test_no_change_on_few_items_is_not_certainty() -> None:
    # Standard error of 0 x 20, +1, -1: sqrt((2 / 21) / 22).
    assert cautious_difference([0.0] * 20).low == pytest.approx(-1.959964 * math.sqrt(2 / 21 / 22))
    assert paired_difference([0.0] * 20).low == 0.0


def test_no_items_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no paired items"):
        cautious_difference([])
    with pytest.raises(ValueError, match="two paired items"):
        paired_difference([1.0])
