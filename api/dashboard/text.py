"""Numbers and times as people read them."""

from datetime import UTC, datetime

from api.dashboard.contexts import Moment

MINUTE, HOUR, DAY = 60, 3600, 86400


def moment(at: float, now: float) -> Moment:
    """`at` and `now` in unix seconds."""
    stamp = datetime.fromtimestamp(at, UTC)
    return Moment(
        iso=stamp.strftime("%Y-%m-%dT%H:%M:%SZ"),
        exact=stamp.strftime("%Y-%m-%d %H:%M:%S UTC"),
        relative=_distance(now - at, stamp),
    )


def _distance(seconds: float, stamp: datetime) -> str:
    if seconds < MINUTE:
        return "just now"
    if seconds < HOUR:
        return f"{int(seconds // MINUTE)} min ago"
    if seconds < DAY:
        return f"{int(seconds // HOUR)} h ago"
    if seconds < 30 * DAY:
        days = int(seconds // DAY)
        return "yesterday" if days == 1 else f"{days} days ago"
    return f"{stamp.day} {stamp.strftime('%b %Y')}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"


def percent(share: float) -> str:
    """A score in [0, 1] without decimals; never rounds a miss up to 100% or a hit down to 0%."""
    whole = round(share * 100)
    if whole == 100 and share < 1:
        return ">99%"
    if whole == 0 and share > 0:
        return "<1%"
    return f"{whole}%"


def points(change: float) -> str:
    """A change of a score in percentage points, signed."""
    rounded = round(change * 100, 1)
    return f"{rounded:+.1f} pt".replace("-", "−") if rounded else "0.0 pt"


def file_size(count: int) -> str:
    """Bytes, decimal units."""
    if count < 1000:
        return f"{count} B"
    if count < 1_000_000:
        return f"{count / 1000:.1f} kB"
    if count < 1_000_000_000:
        return f"{count / 1_000_000:.1f} MB"
    return f"{count / 1_000_000_000:.2f} GB"


def parameters(count: int) -> str:
    if count >= 1_000_000_000:
        return f"{count / 1_000_000_000:.1f} B parameters"
    return f"{count / 1_000_000:.0f} M parameters"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
