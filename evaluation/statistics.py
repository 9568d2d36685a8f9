"""Intervals of proportions and exact tests of paired items; `domain.paired` has paired differences."""

import math
from typing import NamedTuple

from scipy.stats import binom, norm


class Interval(NamedTuple):
    low: float
    high: float


class McNemar(NamedTuple):
    two_sided: float
    one_sided: float
    """P(at least as many regressions | regressions and gains equally likely)."""


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; fractional scores may sum to `successes` (their variance
    is at most a proportion's, so the interval is then too wide, never too narrow). n = 0 tells nothing:
    [0, 1]."""
    if n == 0:
        return Interval(0.0, 1.0)
    p, z = successes / n, _z(confidence)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def mcnemar_exact(regressions: int, gains: int) -> McNemar:
    """Exact McNemar test: of the items that changed, `regressions` went right -> wrong, `gains` the
    other way. No change at all is no evidence: both 1."""
    changed = regressions + gains
    if changed == 0:
        return McNemar(1.0, 1.0)
    two_sided = min(1.0, 2 * float(binom.cdf(min(regressions, gains), changed, 0.5)))
    return McNemar(two_sided, float(binom.sf(regressions - 1, changed, 0.5)))


def _z(confidence: float) -> float:
    return float(norm.ppf(0.5 + confidence / 2))
