"""What was learned and what was forgotten along the champion's lineage, as four figures."""

from api.dashboard.contexts import Tile, Tone
from api.dashboard.text import percent, points
from evaluation.forgetting import ForgettingSummary

GONE = 0.005
"""A smaller loss shows as none."""
LATER = "needs two updates that were measured"


def retention_tiles(summary: ForgettingSummary) -> list[Tile]:
    return [
        Tile(
            "Average accuracy",
            None if summary.acc is None else percent(summary.acc),
            "plain",
            "over learned skills" if summary.skills else "no skill learned yet",
        ),
        _change("Backward transfer", summary.bwt, "since each skill was learned"),
        _loss("Worst forgetting", summary.forgetting_worst, _worst_skill(summary), LATER),
        _loss(
            "General drop",
            summary.general_drop_mean,
            "mean over benchmarks, against v0",
            "needs v0 and this version measured",
        ),
    ]


def _worst_skill(summary: ForgettingSummary) -> str:
    worst = summary.forgetting_worst
    if worst is None or worst < GONE:
        return "best earlier score minus now"
    return next(name for name, skill in summary.skills.items() if skill.forgetting == worst)


def _change(label: str, value: float | None, note: str) -> Tile:
    if value is None:
        return Tile(label, None, "plain", LATER)
    tone: Tone = "bad" if value <= -0.1 else "good" if value >= GONE else "plain"
    return Tile(label, points(value), tone, note)


def _loss(label: str, value: float | None, note: str, missing: str) -> Tile:
    """A loss is shown as what it did to the score: a drop of 0.02 reads -2.0 pt."""
    if value is None:
        return Tile(label, None, "plain", missing)
    tone: Tone = "bad" if value >= 0.1 else "warn" if value >= 0.02 else "good"
    return Tile(label, points(-value), tone, note)
