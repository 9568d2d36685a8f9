"""Draws that pair, cluster and reproduce; intervals against closed forms."""

import math

import numpy as np
import pytest

from benchmarks.bootstrap import DRAWS, Estimate, estimate, item_weights, ratio, seed_weights

ITEMS = tuple(f"i{number}" for number in range(100))


def test_the_first_row_is_the_plain_mean_and_every_row_sums_to_one() -> None:
    weights = item_weights("s", ITEMS)

    assert weights.shape == (1 + DRAWS, 100)
    assert np.array_equal(weights[0], np.full(100, 0.01))
    assert np.allclose(weights.sum(1), 1)


def test_the_spread_of_a_mean_is_the_bootstraps() -> None:
    """Of 100 items with 40 right the bootstrap's standard deviation is sqrt(p q / n) = 0.049."""
    right = np.array([float(number < 40) for number in range(100)])
    means = item_weights("s", ITEMS) @ right

    assert means[0] == pytest.approx(0.4)
    assert means[1:].mean() == pytest.approx(0.4, abs=0.005)
    assert means[1:].std() == pytest.approx(math.sqrt(0.4 * 0.6 / 100), rel=0.06)
    found = estimate(means)
    assert found.low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.015)


def test_items_of_a_cluster_are_drawn_together() -> None:
    weights = item_weights("s", tuple(str(number // 10) for number in range(100)))
    by_cluster = weights.reshape(1 + DRAWS, 10, 10)

    assert (by_cluster == by_cluster[:, :, :1]).all()
    # Whole clusters right or wrong: ten independent things, not a hundred.
    means = weights @ np.repeat([1.0] * 4 + [0.0] * 6, 10)
    assert means[1:].std() == pytest.approx(math.sqrt(0.4 * 0.6 / 10), rel=0.06)


def test_clusters_of_unequal_size_still_weigh_items_alike() -> None:
    weights = item_weights("s", ("x", "x", "y"))

    assert np.allclose(weights.sum(1), 1)
    assert np.allclose(weights[0], 1 / 3)
    assert {tuple(row) for row in weights[1:].round(6)} == {(0.5, 0.5, 0), (0.333333,) * 3, (0, 0, 1)}


def test_the_same_suite_gives_the_same_draws_and_another_suite_others() -> None:
    assert np.array_equal(item_weights("s", ITEMS), item_weights("s", ITEMS))
    assert not np.array_equal(item_weights("s", ITEMS), item_weights("t", ITEMS))


def test_one_seed_is_every_draw() -> None:
    assert (seed_weights([7]) == 1).all()
    assert np.allclose(seed_weights([0, 1, 2])[0], 1 / 3)


def draws(first: float, rest: list[float]) -> np.ndarray:
    return np.array([first, *(rest * (DRAWS // len(rest)))])


def test_a_ratio_takes_what_lost_nothing_as_no_bound() -> None:
    """A tenth of the draws has no denominator, which is above the 97.5% percentile: no upper end."""
    under = draws(0.4, [0.4] * 9 + [0.0])
    over = draws(0.1, [0.1] * 10)

    assert ratio(over, under) == Estimate(pytest.approx(0.25), pytest.approx(0.25), None)
    assert ratio(over, draws(0.0, [0.4])).value is None


def test_a_figure_that_is_not_defined_has_no_interval() -> None:
    assert estimate(np.full(1 + DRAWS, np.nan)) == Estimate(None, None, None)
    assert ratio(np.full(1 + DRAWS, np.nan), draws(1.0, [1.0])) == Estimate(None, None, None)
