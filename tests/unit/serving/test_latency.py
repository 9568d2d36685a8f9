"""Buckets grow by a fourth of a doubling; quantiles come back to within 9%."""

import pytest

from serving.latency import GROWTH, LAST_BUCKET, bucket, quantile


@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.0, 0), (0.001, 0), (0.00101, 0), (0.00201, 4), (0.00801, 12), (1.1, 40), (1e9, LAST_BUCKET)],
)
def test_buckets(seconds: float, number: int) -> None:
    assert bucket(seconds) == number


def test_quantiles_of_known_latencies() -> None:
    counts: dict[int, int] = {}
    for n in range(1, 1001):
        counts[bucket(n / 1000)] = counts.get(bucket(n / 1000), 0) + 1
    for q in (0.5, 0.95, 0.99):
        found = quantile(counts, q)
        assert found is not None
        assert q / GROWTH**0.5 * 0.999 <= found <= q * GROWTH**0.5 * 1.001


def test_quantiles_take_the_nearest_rank() -> None:
    assert quantile({}, 0.5) is None
    low, high = 0.001 * GROWTH**0.5, 0.001 * GROWTH**8.5
    assert quantile({0: 1, 8: 1}, 0.5) == pytest.approx(low)
    assert quantile({0: 1, 8: 1}, 0.51) == pytest.approx(high)
