"""What an assistant learned and forgot along one lineage, for the API and the dashboard alike."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from evaluation.benchmarks import LIKELIHOOD, ORDINARY
from evaluation.forgetting import ForgettingSummary, summarise
from registry import measurements, versions
from registry.tables import Version

NOT_ACCURACY = frozenset({ORDINARY, LIKELIHOOD})
"""General suites whose score is no share of right answers: they have no place in a mean drop."""


@dataclass(frozen=True)
class Retention:
    lineage: list[int]
    """Version numbers from v0 along the parents to the version asked about."""
    learned: dict[str, int]
    """Number of the version of the lineage that first learned each skill."""
    summary: ForgettingSummary


def retention(session: Session, end: Version) -> Retention:
    line = versions.taught_along(session, end)
    position = {number: at for at, (number, _) in enumerate(line)}
    scores: list[dict[str, float | None]] = [{} for _ in line]
    general: list[dict[str, float | None]] = [{} for _ in line]
    for number, kind, suite, score in measurements.scores_along(session, end):
        if not (kind == "general" and suite in NOT_ACCURACY):
            target = scores if kind == "skill" else general
            target[position[number]][suite] = score
    learned: dict[str, int] = {}
    for at, (_, taught) in enumerate(line):
        for skill in taught:
            learned.setdefault(skill, at)
    return Retention(
        lineage=[number for number, _ in line],
        learned={skill: line[at][0] for skill, at in learned.items()},
        summary=summarise(scores, learned, general),
    )
