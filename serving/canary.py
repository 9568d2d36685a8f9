"""Who is answered by a canary, and when what was seen of it says that it does worse. Pure arithmetic.

A canary is judged again and again for as long as it runs, so one look must rarely be wrong: bounds are four
standard errors wide. What cannot be told yet leaves the canary where it is.

Proportions: Wilson's score bound, and Newcombe's for a difference (Statistics in Medicine 17, 1998, method
10). Quantiles: bounds by ranks, which hold for any distribution (Conover, Practical Nonparametric
Statistics, 3.2).
"""

import hashlib
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from domain.traffic import MOST_REQUESTS, Canary, Rule

STANDARD_ERRORS = 4.0


def share_of(assistant_id: str, version_id: str, user: str) -> float:
    """Where the user stands in [0, 1): below a canary's share means answered by it.

    The same user stays there for the same canary version, so raising the share keeps who is in; another
    version draws other users.
    """
    digest = hashlib.blake2b("\0".join((assistant_id, version_id, user)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


@dataclass(frozen=True)
class Seen:
    """One version's requests within the window."""

    requests: int
    errors: int
    latencies: Sequence[float]
    """Seconds to the first byte of those that succeeded, ascending."""

    def latency(self, q: float) -> float | None:
        """The q-quantile by nearest rank; None without a success."""
        if not self.latencies:
            return None
        return self.latencies[max(1, math.ceil(q * len(self.latencies))) - 1]


@dataclass(frozen=True)
class Breach:
    rule: Rule
    reason: str


class Window:
    """The requests of one version in the last `seconds`, at most MOST_REQUESTS of them."""

    def __init__(self) -> None:
        self._requests: deque[tuple[float, float | None]] = deque(maxlen=MOST_REQUESTS)
        """(when, seconds to the first byte or None for a failure), oldest first."""

    def add(self, now: float, latency: float | None) -> None:
        """`latency` None: it failed."""
        self._requests.append((now, latency))

    def seen(self, now: float, seconds: float) -> Seen:
        while self._requests and self._requests[0][0] < now - seconds:
            self._requests.popleft()
        return _seen(self._requests)

    def reaches_back_to(self, now: float, seconds: float) -> float:
        """Since when it holds every request."""
        full = len(self._requests) == MOST_REQUESTS
        return max(now - seconds, self._requests[0][0]) if full else now - seconds

    def seen_since(self, when: float) -> Seen:
        return _seen([request for request in self._requests if request[0] >= when])


def _seen(requests: Collection[tuple[float, float | None]]) -> Seen:
    latencies = sorted(latency for _, latency in requests if latency is not None)
    return Seen(len(requests), len(requests) - len(latencies), latencies)


def judge(
    limits: Canary, canary: Seen, champion: Seen, together: tuple[Seen, Seen] | None = None
) -> Breach | None:
    """Why the canary must go, or None: it does well, or nothing can be said yet.

    Its error rate must be above the limit beyond doubt, and above the champion's where that has enough
    requests to compare: an engine that fails both is no fault of the canary's. `together` is what was seen of
    the two in the time that both windows cover, where that is less than the whole of either; only this is
    compared, since an outage that one window remembers and the other does not says nothing about versions.
    """
    if canary.requests < limits.min_requests:
        return None
    comparable = champion.requests >= limits.min_requests
    mine, others = together or (canary, champion)
    low, _ = wilson_bounds(canary.errors, canary.requests)
    if low > limits.max_error_rate and (not comparable or difference_low(mine, others) > 0):
        against = f"; the champion {others.errors} of {others.requests}" if comparable else ""
        if against and mine.requests < canary.requests:
            against = f", {mine.errors} of the last {mine.requests}{against} in that time"
        return Breach(
            "error_rate",
            f"it failed {canary.errors} of {canary.requests} requests, surely more than "
            f"{limits.max_error_rate:.1%}{against}",
        )
    if not comparable or len(canary.latencies) < limits.min_requests:
        return None
    for rule, q in (("latency_p50", 0.5), ("latency_p95", 0.95)):
        least, most = quantile_low(mine.latencies, q), quantile_high(others.latencies, q)
        if least is not None and most is not None and least > limits.max_latency_ratio * most:
            return Breach(
                "latency_p50" if rule == "latency_p50" else "latency_p95",
                f"its first byte takes at least {least:.3f} s ({q:.0%} quantile), the champion's at most "
                f"{most:.3f} s: surely more than {limits.max_latency_ratio:g} times as long",
            )
    return None


def wilson_bounds(successes: int, n: int) -> tuple[float, float]:
    """Lower and upper bound of a proportion, each one-sided at STANDARD_ERRORS; n = 0 tells nothing."""
    if n == 0:
        return 0.0, 1.0
    p, z = successes / n, STANDARD_ERRORS
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def difference_low(canary: Seen, champion: Seen) -> float:
    """Lower bound of the canary's error rate less the champion's; -1 where one of them had no request."""
    if not canary.requests or not champion.requests:
        return -1.0
    mine, other = canary.errors / canary.requests, champion.errors / champion.requests
    low, _ = wilson_bounds(canary.errors, canary.requests)
    _, high = wilson_bounds(champion.errors, champion.requests)
    return mine - other - math.hypot(mine - low, high - other)


def quantile_low(ascending: Sequence[float], q: float) -> float | None:
    """Lower bound of the q-quantile; None when there are too few values for one."""
    n = len(ascending)
    rank = math.floor(n * q - STANDARD_ERRORS * math.sqrt(n * q * (1 - q)))
    return ascending[rank - 1] if rank >= 1 else None


def quantile_high(ascending: Sequence[float], q: float) -> float | None:
    """Upper bound of the q-quantile; None when there are too few values for one."""
    n = len(ascending)
    rank = math.ceil(n * q + STANDARD_ERRORS * math.sqrt(n * q * (1 - q))) + 1
    return ascending[rank - 1] if rank <= n else None
