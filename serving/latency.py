"""Latencies as counts in geometric buckets, which can be added up, and quantiles of them."""

import math
from collections.abc import Mapping

SMALLEST_SECONDS = 0.001
GROWTH = 2**0.25
"""From one bucket's lower edge to the next: a quantile is off by at most 9%."""
LAST_BUCKET = 80
"""Begins above a quarter of an hour."""


def bucket(seconds: float) -> int:
    """Bucket b holds latencies from SMALLEST_SECONDS * GROWTH**b up to the next edge; 0 also what is
    smaller, the last also what is longer."""
    if seconds <= SMALLEST_SECONDS:
        return 0
    return min(LAST_BUCKET, int(math.log(seconds / SMALLEST_SECONDS, GROWTH)))


def quantile(counts: Mapping[int, int], q: float) -> float | None:
    """Seconds: the geometric middle of the bucket where the q-quantile (nearest rank) lies; None without
    counts."""
    rank, seen = max(1, math.ceil(q * sum(counts.values()))), 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= rank:
            return float(SMALLEST_SECONDS * GROWTH ** (number + 0.5))
    return None
