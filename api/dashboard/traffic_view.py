"""What share of an assistant's requests goes where, and how each side does."""

from collections.abc import Mapping, Sequence

from api.dashboard.contexts import Notice, Pill, Tone, TrafficPanel, TrafficSide
from api.dashboard.links import version_link
from api.dashboard.text import duration, percent
from domain.version import CHAMPION
from registry import traffic
from registry.tables import Alias, TrafficFigures, TrafficRow
from serving.latency import quantile

_TONES: dict[str, Tone] = {"champion": "good", "canary": "warn", "shadow": "plain"}


def traffic_panel(
    assistant: str,
    row: TrafficRow | None,
    figures: Sequence[TrafficFigures],
    aliases: Sequence[Alias],
    numbers: Mapping[str, int],
    now: float,
) -> TrafficPanel | None:
    """`numbers` are versions' by id. None: the traffic was never shared out."""
    if row is None:
        return None
    shares = _shares(row, {alias.name: alias.version_id for alias in aliases})
    known = {(one.role, one.version_id): one for one in figures}
    # What gets requests first, then what got some.
    keys = [*shares, *(key for key in known if key not in shares)]
    return TrafficPanel(
        notice=_notice(row, now),
        sides=[_side(assistant, key, shares.get(key, "–"), known.get(key), numbers) for key in keys],
    )


def _shares(row: TrafficRow, targets: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """By role and version id, what it gets; an alias that is gone gets nothing."""
    wanted = traffic.shares(row)
    part = 0.0 if wanted.canary is None else wanted.canary.percent
    found = {("champion", targets[CHAMPION]): f"{100 - part:g}% of users"}
    if wanted.canary is not None and wanted.canary.alias in targets:
        found["canary", targets[wanted.canary.alias]] = f"{part:g}% of users"
    if wanted.shadow is not None and wanted.shadow.alias in targets:
        found["shadow", targets[wanted.shadow.alias]] = f"asked {wanted.shadow.percent:g}% of requests too"
    return found


def _side(
    assistant: str,
    key: tuple[str, str],
    share: str,
    figures: TrafficFigures | None,
    numbers: Mapping[str, int],
) -> TrafficSide:
    role, version_id = key
    latency = {} if figures is None else {int(one): count for one, count in figures.latency.items()}
    return TrafficSide(
        pill=Pill(role, _TONES[role]),
        version=version_link(assistant, numbers[version_id]),
        share=share,
        requests="0" if figures is None else f"{figures.requests:,}",
        errors=_ratio(figures.errors, figures.requests) if figures is not None else "–",
        median=_seconds(quantile(latency, 0.5)),
        tail=_seconds(quantile(latency, 0.95)),
        agreement=_agreement(figures),
    )


def _agreement(figures: TrafficFigures | None) -> str:
    if figures is None or not figures.compared:
        return "–"
    parts = [
        f"{_ratio(figures.identical, figures.compared)} same text",
        f"ROUGE-L {figures.rouge_l / figures.compared:.2f}",
    ]
    if figures.graded:
        parts.append(f"{_ratio(figures.agreed, figures.graded)} agree")
    return ", ".join(parts)


def _notice(row: TrafficRow, now: float) -> Notice | None:
    if row.last_rollback is None:
        return None
    reason = str(row.last_rollback["reason"])
    if row.cooldown_until is not None and row.cooldown_until > now:
        left = duration(row.cooldown_until - now)
        return Notice(f"Canary rolled back: {reason}. No other for {left}.", "bad")
    return Notice(f"Last canary was rolled back: {reason}.", "warn")


def _ratio(part: float, whole: int) -> str:
    return percent(part / whole) if whole else "–"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
