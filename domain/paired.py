"""Mean change over identical items, with its interval: the gate and the trainer's preflight need it alike."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple


class Difference(NamedTuple):
    """A mean paired difference and its interval."""

    mean: float
    low: float
    high: float


def paired_difference(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean of new - old over identical items, and its normal interval (sample standard deviation).

    Raises ValueError below two items. Its width is 0 when all differences are equal, so no decision may
    rest on it for small sets: see `cautious_difference`.
    """
    n = len(differences)
    if n < 2:
        raise ValueError("an interval needs at least two paired items")
    mean = math.fsum(differences) / n
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance / n)
    return Difference(mean, mean - half, mean + half)


def cautious_difference(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """The observed mean with an interval that holds for small sets too.

    Bonett and Price (2012): one imagined item that got fully better and one that got fully worse are
    added before the normal interval is taken, so that equal differences don't pass for certainty.
    Raises ValueError without items.
    """
    if not differences:
        raise ValueError("no paired items")
    widened = paired_difference([*differences, 1.0, -1.0], confidence)
    mean = math.fsum(differences) / len(differences)
    return Difference(mean, max(-1.0, widened.low), min(1.0, widened.high))
