"""What came of sharing an assistant's traffic out: sums that several processes add to."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.traffic import Role
from registry.session import db_now, violates_unique
from registry.tables import Assistant, TrafficFigures

SUMS = ("requests", "errors", "dropped", "compared", "identical", "rouge_l", "graded", "agreed")


@dataclass
class Figures:
    """Sums to be added to one row of TrafficFigures."""

    assistant_id: str
    team_id: str
    role: Role
    version_id: str
    requests: int = 0
    errors: int = 0
    dropped: int = 0
    compared: int = 0
    identical: int = 0
    rouge_l: float = 0.0
    graded: int = 0
    agreed: float = 0.0
    latency: dict[int, int] = field(default_factory=dict)
    """Requests by `serving.latency` bucket."""

    def add(self, other: "Figures") -> None:
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for bucket, count in other.latency.items():
            self.latency[bucket] = self.latency.get(bucket, 0) + count


def add_figures(session: Session, found: Iterable[Figures]) -> None:
    """Add to what is known; several processes may do so at once."""
    # In one order everywhere, or two processes could wait for each other.
    for one in sorted(found, key=lambda one: (one.assistant_id, one.role, one.version_id)):
        row = _locked_figures(session, one)
        for name in SUMS:
            setattr(row, name, getattr(row, name) + getattr(one, name))
        latency = dict(row.latency)
        for bucket, count in one.latency.items():
            latency[str(bucket)] = latency.get(str(bucket), 0) + count
        row.latency = latency
        row.updated_at = db_now(session)
        session.flush()


def list_figures(session: Session, assistant: Assistant) -> list[TrafficFigures]:
    """Champion's, canary's, shadow's; the version seen last comes last."""
    rows = session.scalars(select(TrafficFigures).where(TrafficFigures.assistant_id == assistant.id))
    order = {"champion": 0, "canary": 1, "shadow": 2}
    return sorted(rows, key=lambda row: (order[row.role], row.updated_at))


def _locked_figures(session: Session, one: Figures) -> TrafficFigures:
    key = (one.assistant_id, one.role, one.version_id)
    row = session.get(TrafficFigures, key, with_for_update=True, populate_existing=True)
    if row is not None:
        return row
    row = TrafficFigures(
        assistant_id=one.assistant_id,
        role=one.role,
        version_id=one.version_id,
        team_id=one.team_id,
        requests=0,
        errors=0,
        dropped=0,
        compared=0,
        identical=0,
        rouge_l=0.0,
        graded=0,
        agreed=0.0,
        latency={},
        updated_at=0.0,
    )
    try:
        with session.begin_nested():
            session.add(row)
            session.flush()
    except IntegrityError as error:
        if not violates_unique(error):
            raise
        return session.get_one(TrafficFigures, key, with_for_update=True, populate_existing=True)
    return row
