"""Leases: which worker runs an update, for how long, and how that ends.

Every change of state is one event of type `message` (or `phase`), written here.
"""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from domain.errors import StaleFence
from domain.measurement import Verdict
from domain.update import Phase, Status, require_transition
from domain.version import CHAMPION
from registry import audit, events
from registry.claims import Claim, Signals, held
from registry.session import clock, db_now, violates_unique
from registry.tables import Alias, Update


def claimable(session: Session) -> list[str]:
    """Ids of the updates that `claim` would grant now, oldest first."""
    return list(session.scalars(select(Update.id).where(_claimable()).order_by(Update.seq)))


def claim(session: Session, update_id: str, *, worker: str, lease_seconds: float) -> Claim | None:
    """Take the update for `lease_seconds` of database time, or None when it is not to be had.

    Free is the oldest queued update of an assistant of which none runs, or a running one whose lease ran
    out. The first claim fixes the parent: the champion of that moment. `worker` must be unique per
    process start.
    """
    champion = (
        select(Alias.version_id)
        .where(Alias.assistant_id == Update.assistant_id, Alias.name == CHAMPION)
        .scalar_subquery()
    )
    try:
        with session.begin_nested():
            taken = session.execute(
                update(Update)
                .where(Update.id == update_id, _claimable())
                .values(
                    status=Status.RUNNING,
                    fence=Update.fence + 1,
                    claimed_by=worker,
                    lease_until=clock() + lease_seconds,
                    started_at=func.coalesce(Update.started_at, clock()),
                    parent_version_id=func.coalesce(Update.parent_version_id, champion),
                )
                .returning(Update.fence, Update.team_id, Update.assistant_id)
                .execution_options(synchronize_session=False)
            ).one_or_none()
    except IntegrityError as error:
        # The index of one running update per assistant: another worker was first.
        if not violates_unique(error):
            raise
        return None
    if taken is None:
        return None
    granted = Claim(update_id, taken.fence, taken.team_id, taken.assistant_id)
    events.append(
        session,
        held(session, granted),
        type="message",
        message="Started." if granted.fence == 1 else "Taken up again.",
        data={"status": Status.RUNNING, "worker": worker, "fence": granted.fence},
    )
    return granted


def heartbeat(session: Session, claim: Claim, lease_seconds: float) -> Signals:
    """Extend the lease and hear what people asked for. Raises StaleFence."""
    row = session.execute(
        update(Update)
        .where(Update.id == claim.update_id, Update.fence == claim.fence, Update.status == Status.RUNNING)
        .values(lease_until=clock() + lease_seconds)
        .returning(Update.cancel_requested, Update.pause_requested)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        raise StaleFence(f"Fence {claim.fence} of update {claim.update_id} is no longer current.")
    return Signals(cancel=row.cancel_requested, pause=row.pause_requested)


def set_phase(session: Session, claim: Claim, phase: Phase) -> None:
    """Raises StaleFence."""
    row = held(session, claim)
    row.phase = phase
    events.append(session, row, type="phase", message=phase, data={"phase": phase})


def finish(
    session: Session,
    claim: Claim,
    status: Status,
    *,
    verdict: Verdict | None = None,
    error: Mapping[str, str | None] | None = None,
) -> Update:
    """End the update. Raises StaleFence.

    It ends `cancelled`, whatever `status` says, when a cancel was acknowledged before a version was
    published; a published version's own verdict stands against `verdict`. `error` is {code, message, param}.
    """
    row = held(session, claim)
    if row.cancel_requested and row.version_id is None:
        status = Status.CANCELLED
    require_transition(Status(row.status), status)
    row.status = status
    row.lease_until = None
    row.finished_at = db_now(session)
    if row.version_id is None and verdict is not None:
        row.verdict = verdict.model_dump(mode="json")
    if status == Status.FAILED and error is not None:
        row.error = dict(error)
    message = f"{status.value.capitalize()}."
    if row.error is not None:
        message = f"Failed: {row.error['message']}"
    events.append(
        session,
        row,
        type="message",
        message=message,
        level="error" if status == Status.FAILED else "info",
        data={"status": status, "error": row.error},
    )
    audit.record(
        session,
        team_id=row.team_id,
        actor="worker",
        action="update.finish",
        object_id=row.id,
        data={"status": status, "version": row.version_id, "error": row.error},
    )
    return row


def release(session: Session, claim: Claim) -> Update:
    """Give the lease back: to `cancelled` or `paused` when asked for, else to `queued`. Raises StaleFence."""
    row = held(session, claim)
    if row.cancel_requested and row.version_id is None:
        return finish(session, claim, Status.CANCELLED)
    status = Status.PAUSED if row.pause_requested else Status.QUEUED
    require_transition(Status(row.status), status)
    row.status = status
    row.pause_requested = False
    row.claimed_by = None
    row.lease_until = None
    events.append(
        session, row, type="message", message=f"{status.value.capitalize()}.", data={"status": status}
    )
    return row


def _claimable() -> ColumnElement[bool]:
    other, older = aliased(Update), aliased(Update)
    none_runs = ~exists().where(other.assistant_id == Update.assistant_id, other.status == Status.RUNNING)
    none_older = ~exists().where(
        older.assistant_id == Update.assistant_id, older.status == Status.QUEUED, older.seq < Update.seq
    )
    return or_(
        and_(Update.status == Status.QUEUED, none_runs, none_older),
        and_(Update.status == Status.RUNNING, Update.lease_until < clock()),
    )
