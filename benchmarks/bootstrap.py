"""Paired bootstrap over items and seeds: every version is read with the same draws, so that draws pair.

Koehn (2004); Miller (2024), arXiv:2411.00640, on clusters. Intervals are percentiles of the draws.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure on the items as they are, and its interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


@lru_cache(maxsize=64)
def item_weights(suite: str, clusters: tuple[str, ...]) -> Floats:
    """[1 + DRAWS, items]: row 0 weighs all items alike, each other row is one resample of the clusters.

    `clusters` names, item by item, what it is resampled with. Rows sum to 1. The same suite and clusters
    give the same draws whoever asks.
    """
    names = sorted(set(clusters))
    place = {name: index for index, name in enumerate(names)}
    of_item = np.array([place[name] for name in clusters])
    generator = np.random.default_rng(zlib.crc32(suite.encode()))
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=1 + DRAWS)
    counts[0] = 1
    weights: Floats = counts[:, of_item] / counts[:, of_item].sum(1, keepdims=True)
    return weights


def seed_weights(seeds: Sequence[int]) -> Floats:
    """[1 + DRAWS, seeds], as `item_weights`; with one seed all draws are that seed."""
    return item_weights("seeds", tuple(str(seed) for seed in seeds))


def estimate(draws: Floats) -> Estimate:
    """Of [1 + DRAWS] values: the first, and the percentiles of the others.

    Undefined draws (nan) make the whole undefined: leaving them out would flatter. An infinite end is
    None, no bound.
    """
    if np.isnan(draws).any():
        value = None if np.isnan(draws[0]) else float(draws[0])
        return Estimate(value if value is None or np.isfinite(value) else None, None, None)
    tail = (1 - CONFIDENCE) / 2
    # No interpolation: between a number and infinity there is nothing.
    low, high = np.quantile(draws[1:], [tail, 1 - tail], method="inverted_cdf")
    return Estimate(*(float(v) if np.isfinite(v) else None for v in (draws[0], low, high)))


def ratio(over: Floats, under: Floats) -> Estimate:
    """over / under draw by draw; a draw whose `under` is not positive has no finite ratio and counts as
    the largest. The figure itself is None when its own `under` is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(under > 0, over / under, np.inf)
    return estimate(np.where(np.isnan(over) | np.isnan(under), np.nan, ratios))
