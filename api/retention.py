"""What an assistant learned and forgot along one lineage, for the API and the dashboard alike."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from evaluation.benchmarks import LIKELIHOOD, ORDINARY
from evaluation.forgetting import ForgettingSummary, summarise
from registry import measurements, versions
from registry.overview import taught_skills
from registry.tables import Assistant, Version

NOT_ACCURACY = frozenset({ORDINARY, LIKELIHOOD})
"""General suites whose score is no share of right answers: they have no place in a mean drop."""


@dataclass(frozen=True)
class Retention:
    lineage: list[Version]
    """From v0 along the parents to the version asked about."""
    learned: dict[str, Version]
    """The version of the lineage that first learned each skill."""
    summary: ForgettingSummary


def retention(session: Session, assistant: Assistant, end: Version) -> Retention:
    line = versions.lineage(session, end)
    position = {row.number: at for at, row in enumerate(line)}
    scores: list[dict[str, float | None]] = [{} for _ in line]
    general: list[dict[str, float | None]] = [{} for _ in line]
    for one in measurements.matrix(session, assistant):
        if one.version in position and not (one.kind == "general" and one.suite in NOT_ACCURACY):
            target = scores if one.kind == "skill" else general
            target[position[one.version]][one.suite] = one.score
    taught = taught_skills(session, line)
    learned: dict[str, int] = {}
    for at, row in enumerate(line):
        for skill in taught.get(row.id, []):
            learned.setdefault(skill, at)
    return Retention(
        lineage=line,
        learned={skill: line[at] for skill, at in learned.items()},
        summary=summarise(scores, learned, general),
    )
