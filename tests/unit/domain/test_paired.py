"""Paired differences against the shared worked values and by hand."""

import math

import pytest

from domain.paired import cautious_difference, paired_difference


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
