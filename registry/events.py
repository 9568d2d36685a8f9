"""Events of an update, numbered 1, 2, 3 ... within it."""

from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.claims import Claim, held, locked
from registry.session import db_now
from registry.tables import Event, Update

EventType = Literal["message", "metrics", "phase", "verdict"]
Level = Literal["info", "warning", "error"]


def add_event(
    session: Session,
    update_id: str,
    *,
    type: EventType,
    message: str,
    level: Level = "info",
    data: dict[str, Any] | None = None,
    claim: Claim | None,
) -> Event:
    """With a claim, raises StaleFence unless the claim still holds the update."""
    update = locked(session, update_id) if claim is None else held(session, claim)
    return append(session, update, type=type, message=message, level=level, data=data)


def append(
    session: Session,
    update: Update,
    *,
    type: EventType,
    message: str,
    level: Level = "info",
    data: dict[str, Any] | None = None,
) -> Event:
    """The next event of an update that this transaction has locked or just inserted."""
    last = session.scalar(select(func.max(Event.seq)).where(Event.update_id == update.id))
    event = Event(
        team_id=update.team_id,
        update_id=update.id,
        seq=(last or 0) + 1,
        type=type,
        level=level,
        message=message,
        data=data or {},
        created_at=db_now(session),
    )
    session.add(event)
    session.flush()
    return event


def list_events(session: Session, update: Update, after_seq: int, limit: int) -> list[Event]:
    """Up to `limit` events with `seq` above `after_seq`, oldest first."""
    return list(
        session.scalars(
            select(Event)
            .where(Event.update_id == update.id, Event.seq > after_seq)
            .order_by(Event.seq)
            .limit(limit)
        )
    )


def newest_events(session: Session, update: Update, before_seq: int | None, limit: int) -> list[Event]:
    """Up to `limit` events, newest first; with `before_seq` only those with a lower `seq`."""
    rows = select(Event).where(Event.update_id == update.id)
    if before_seq is not None:
        rows = rows.where(Event.seq < before_seq)
    return list(session.scalars(rows.order_by(Event.seq.desc()).limit(limit)))
