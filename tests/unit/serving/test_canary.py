"""Shares are sticky and even; a canary goes when it is surely worse, and only then. Values worked by hand."""

import pytest

from domain.traffic import MOST_REQUESTS, Canary
from serving.canary import (
    Seen,
    Window,
    difference_low,
    judge,
    quantile_high,
    quantile_low,
    share_of,
    wilson_bounds,
)


def seen(requests: int, errors: int = 0, latency: float = 0.1) -> Seen:
    """Latencies from `latency` to twice that, evenly."""
    good = requests - errors
    return Seen(requests, errors, [latency * (1 + n / max(1, good)) for n in range(good)])


def test_a_users_place_is_even_stays_and_belongs_to_the_version() -> None:
    users = [f"user-{n}" for n in range(10_000)]
    places = {user: share_of("asst_1", "ver_1", user) for user in users}
    assert all(0 <= place < 1 for place in places.values())
    five = {user for user in users if places[user] < 0.05}
    assert 434 <= len(five) <= 566, "within three standard errors (21.8) of 500"
    assert five <= {user for user in users if share_of("asst_1", "ver_1", user) < 0.20}
    for assistant, version in (("asst_1", "ver_2"), ("asst_2", "ver_1")):
        others = {user for user in users if share_of(assistant, version, user) < 0.05}
        assert len(five & others) < 60, "another draw: 25 are expected in both"


def test_wilson_bounds() -> None:
    # p 0.1, z 4: centre 0.18, half 4 * sqrt(0.0009 + 0.0004) = 0.144222, scale 1.16
    assert wilson_bounds(10, 100) == pytest.approx((0.030843, 0.279502), abs=1e-6)
    assert wilson_bounds(0, 0) == (0.0, 1.0)
    assert wilson_bounds(50, 50)[0] == pytest.approx(50 / 66)
    assert wilson_bounds(0, 50) == pytest.approx((0.0, 16 / 66), abs=1e-12)


def test_difference_low() -> None:
    # champion 1 of 100: upper bound 0.154615; 0.09 - hypot(0.069157, 0.144615)
    assert difference_low(seen(100, 10), seen(100, 1)) == pytest.approx(-0.070300, abs=1e-5)
    # champion 10 of 1000: upper bound 0.032395; 0.09 - hypot(0.069157, 0.022395)
    assert difference_low(seen(100, 10), seen(1000, 10)) == pytest.approx(0.017307, abs=1e-5)


def test_bounds_of_quantiles_by_ranks() -> None:
    hundred = list(range(1, 101))
    assert (quantile_low(hundred, 0.5), quantile_high(hundred, 0.5)) == (30, 71)  # 50 -+ 4 * 5
    assert (quantile_low(hundred, 0.95), quantile_high(hundred, 0.95)) == (86, None)  # 95 -+ 8.72
    more = list(range(1, 401))
    assert (quantile_low(more, 0.95), quantile_high(more, 0.95)) == (362, 399)  # 380 -+ 17.44
    assert quantile_low([1.0, 2.0], 0.5) is None


@pytest.mark.parametrize(
    ("limit", "canary", "champion", "goes"),
    [
        (0.03, (100, 10), (1000, 10), True),
        (0.031, (100, 10), (1000, 10), False),  # the lower bound is 0.0308
        (0.03, (100, 10), (100, 1), False),  # surely above the limit, not surely above the champion
        (0.03, (100, 10), (49, 0), True),  # too few of the champion's: the limit alone
        (0.03, (49, 49), (1000, 0), False),  # too few of its own
        (0.03, (50, 50), (1000, 0), True),
        (0.03, (500, 500), (500, 500), False),  # the engine fails both
    ],
)
def test_errors(limit: float, canary: tuple[int, int], champion: tuple[int, int], goes: bool) -> None:
    breach = judge(Canary(percent=5, max_error_rate=limit), seen(*canary), seen(*champion))
    assert (breach is not None and breach.rule == "error_rate") is goes


def test_the_reason_names_the_figures() -> None:
    breach = judge(Canary(percent=5, max_error_rate=0.03), seen(100, 10), seen(1000, 10))
    assert breach is not None
    assert breach.reason == ("it failed 10 of 100 requests, surely more than 3.0%; the champion 10 of 1000")


def test_latency_at_the_median() -> None:
    # champion 0.10 .. 0.20: upper bound of the median is value 71 of 100, 0.17; canary's lower one value 30,
    # 1.29 times its start. Twice as slow is surely so from 0.34 / 1.29 = 0.2636 on.
    limits = Canary(percent=5, max_latency_ratio=2.0)
    assert judge(limits, seen(100, latency=0.2635), seen(100, latency=0.1)) is None
    breach = judge(limits, seen(100, latency=0.2637), seen(100, latency=0.1))
    assert breach is not None
    assert breach.rule == "latency_p50"
    assert "0.340 s" in breach.reason
    assert judge(limits, seen(49, latency=9.0), seen(100)) is None, "too few of its own"
    assert judge(limits, seen(100, latency=9.0), seen(49)) is None, "too few of the champion's"


def test_latency_in_the_tail() -> None:
    quick = Seen(1000, 0, [0.1] * 1000)
    tail = Seen(1000, 0, [0.1] * 900 + [1.0] * 100)
    breach = judge(Canary(percent=5), tail, quick)
    assert breach is not None
    assert breach.rule == "latency_p95"
    # value 950 - 27.6 = 922 is 0.1 here: the tail may be chance
    assert judge(Canary(percent=5), Seen(1000, 0, [0.1] * 935 + [1.0] * 65), quick) is None


def test_failures_have_no_latency_to_judge() -> None:
    assert judge(Canary(percent=5, max_error_rate=0.99), seen(80, 40, latency=9.0), seen(100)) is None


def test_the_window_forgets() -> None:
    window = Window()
    window.add(0.0, None)
    window.add(5.0, 0.2)
    window.add(9.0, 0.1)
    assert window.seen(10.0, 10.0) == Seen(3, 1, [0.1, 0.2])
    assert window.seen(10.5, 10.0) == Seen(2, 0, [0.1, 0.2])
    assert window.seen(30.0, 10.0) == Seen(0, 0, [])
    for n in range(MOST_REQUESTS + 1):
        window.add(40.0, float(n))
    full = window.seen(40.0, 10.0)
    assert (full.requests, full.latencies[0]) == (MOST_REQUESTS, 1.0)


def test_quantiles_shown_are_the_nearest_rank() -> None:
    assert (seen(0).latency(0.5), Seen(3, 0, [1.0, 2.0, 3.0]).latency(0.5)) == (None, 2.0)
    assert Seen(3, 0, [1.0, 2.0, 3.0]).latency(0.95) == 3.0
