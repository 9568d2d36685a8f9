"""Leases: which worker runs an update, for how long, and how that ends.

Every change of state is one event of type `message` (or `phase`), written here.
"""

from collections.abc import Mapping

from sqlalchemy import ColumnElement, and_, case, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from domain.errors import StaleFence
from domain.measurement import Verdict
from domain.update import Phase, Status, require_transition
from domain.version import CHAMPION
from registry import audit, events, job_results
from registry.claims import Claim, Patience, Signals, held
from registry.session import clock, db_now, violates_unique
from registry.tables import Alias, Update

DEFAULT_PATIENCE = Patience()


def claimable(session: Session, patience: Patience = DEFAULT_PATIENCE) -> list[str]:
    """Ids of the updates that `claim` would look at now, oldest first."""
    return list(session.scalars(select(Update.id).where(_claimable(patience)).order_by(Update.seq)))


def claim(
    session: Session,
    update_id: str,
    *,
    worker: str,
    lease_seconds: float,
    patience: Patience = DEFAULT_PATIENCE,
) -> Claim | None:
    """Take the update for `lease_seconds` of database time, or None when it is not to be had.

    Free is the oldest queued update of an assistant of which none runs, or a running one whose lease ran
    out; after a setback not before `patience` says. The first claim fixes the parent: the champion of
    that moment. `worker` must be unique per process start.

    An update whose lease ran out for the `patience.tries`th time without progress is not granted but
    ended here: whatever kills its workers would kill the next one too.
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
                .where(Update.id == update_id, _claimable(patience))
                .values(
                    status=Status.RUNNING,
                    fence=Update.fence + 1,
                    claimed_by=worker,
                    lease_until=clock() + lease_seconds,
                    setbacks=case(
                        (Update.status == Status.RUNNING, Update.setbacks + 1), else_=Update.setbacks
                    ),
                    not_before=None,
                    started_at=func.coalesce(Update.started_at, clock()),
                    parent_version_id=func.coalesce(Update.parent_version_id, champion),
                )
                .returning(Update.fence, Update.setbacks, Update.team_id, Update.assistant_id)
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
    row = held(session, granted)
    if taken.setbacks >= patience.tries:
        _give_up(session, granted, row)
        return None
    events.append(
        session,
        row,
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


def note_progress(session: Session, claim: Claim) -> None:
    """The update got further than ever before: its setbacks so far count no more. Raises StaleFence."""
    held(session, claim).setbacks = 0


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
    if status == Status.SUCCEEDED:
        job_results.keep_metrics(session, row)
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


def retry_later(
    session: Session, claim: Claim, error: Mapping[str, str | None], patience: Patience = DEFAULT_PATIENCE
) -> Update:
    """Give the lease back after a failure that may pass: queued again, but not at once; or failed with
    `error` ({code, message, param}) after `patience.tries` setbacks in a row. An acknowledged cancel or
    pause comes first. Raises StaleFence."""
    row = held(session, claim)
    row.setbacks += 1
    if row.cancel_requested or row.pause_requested:
        return release(session, claim)
    if row.setbacks >= patience.tries:
        message = f"{error['message']} (Tried {row.setbacks} times.)"
        return finish(session, claim, Status.FAILED, error={**error, "message": message})
    seconds = patience.seconds(row.setbacks)
    release(session, claim)
    row.not_before = db_now(session) + seconds
    events.append(
        session,
        row,
        type="message",
        level="warning",
        message=f"Trying again in {seconds:.0f} s ({row.setbacks} of {patience.tries} tries): "
        f"{error['message']}",
        data={"setbacks": row.setbacks, "not_before": row.not_before, "error": dict(error)},
    )
    return row


def _give_up(session: Session, claim: Claim, row: Update) -> None:
    """End an update that lost too many workers. One that has published has done its work."""
    if row.version_id is not None:
        finish(session, claim, Status.SUCCEEDED)
        return
    error = {
        "code": "worker_lost",
        "message": f"{row.setbacks} workers in a row were lost while they ran this update "
        f"(phase: {row.phase or 'claimed'}): most likely it needs more memory than they have. "
        "Their logs tell more.",
        "param": None,
    }
    finish(session, claim, Status.FAILED, error=error)


def _claimable(patience: Patience) -> ColumnElement[bool]:
    other, older = aliased(Update), aliased(Update)
    none_runs = ~exists().where(other.assistant_id == Update.assistant_id, other.status == Status.RUNNING)
    none_older = ~exists().where(
        older.assistant_id == Update.assistant_id, older.status == Status.QUEUED, older.seq < Update.seq
    )
    due = or_(Update.not_before.is_(None), Update.not_before < clock())
    waits = {setbacks: patience.seconds(setbacks) for setbacks in range(patience.tries)}
    wait = case(waits, value=Update.setbacks, else_=patience.most_seconds)
    return or_(
        and_(Update.status == Status.QUEUED, due, none_runs, none_older),
        and_(Update.status == Status.RUNNING, Update.lease_until + wait < clock()),
    )
