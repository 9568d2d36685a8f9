import pytest

from api.dashboard.text import duration, file_size, moment, parameters, percent, points

NOON = 1_795_348_800.0  # 2026-11-22 12:00:00 UTC


@pytest.mark.parametrize(
    ("ago", "relative"),
    [
        (-5, "just now"),
        (59, "just now"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600, "1 h ago"),
        (86399, "23 h ago"),
        (86400, "yesterday"),
        (2 * 86400, "2 days ago"),
        (30 * 86400, "23 Oct 2026"),
    ],
)
def test_a_moment_is_exact_in_utc_and_relative_to_now(ago: float, relative: str) -> None:
    assert moment(NOON - ago, NOON).relative == relative


def test_a_moment_names_its_second_in_utc() -> None:
    shown = moment(NOON + 7.9, NOON + 100)

    assert shown.exact == "2026-11-22 12:00:07 UTC"
    assert shown.iso == "2026-11-22T12:00:07Z"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (0.001, "<1%"), (0.833, "83%"), (0.996, ">99%"), (1.0, "100%")],
)
def test_percent_never_rounds_to_a_perfect_score(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [(0.05, "+5.0 pt"), (-0.4333, "−43.3 pt"), (0.0004, "0.0 pt"), (-0.0004, "0.0 pt")],
)
def test_points_carry_their_sign(change: float, text: str) -> None:
    assert points(change) == text


def test_sizes() -> None:
    assert [file_size(n) for n in (999, 1500, 2_500_000, 3_210_000_000)] == [
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.21 GB",
    ]
    assert [parameters(n) for n in (134_515_008, 7_615_616_512)] == ["135 M parameters", "7.6 B parameters"]
