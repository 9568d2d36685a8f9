"""The outbox: what webhooks must be told, written in the transaction of what happened.

Delivery is at least once: an attempt is claimed for a while, and one that nobody settles is made again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from domain.ids import new_id
from domain.update import Status
from domain.webhook import EventType, pause_after
from registry.session import clock, db_now
from registry.tables import AuditRow, Webhook, WebhookDelivery

GONE = 410
"""The receiver wants no more: the standard's way to unsubscribe."""
_ENDED: Mapping[str, EventType] = {
    Status.PAUSED: "update.paused",
    Status.SUCCEEDED: "update.succeeded",
    Status.FAILED: "update.failed",
    Status.CANCELLED: "update.cancelled",
}


@dataclass(frozen=True)
class Attempt:
    """One claimed delivery."""

    id: str
    number: int
    """1 for the first."""
    url: str
    secret: str
    body: str


def announce(session: Session, entry: AuditRow) -> None:
    """Put what the audit entry tells into the outbox of every webhook that wants to hear of it."""
    type = _event_type(entry.action, entry.data)
    if type is None:
        return
    hooks = session.scalars(
        select(Webhook).where(Webhook.team_id == entry.team_id, Webhook.disabled_because.is_(None))
    )
    for hook in hooks:
        if not hook.event_types or type in hook.event_types:
            enqueue(session, hook, type, entry)


def enqueue(session: Session, webhook: Webhook, type: EventType, entry: AuditRow) -> str:
    """Id of a new delivery to `webhook`, due at once."""
    body = {
        "id": entry.id,
        "object": "event",
        "type": type,
        "timestamp": datetime.fromtimestamp(entry.created_at, UTC).isoformat(timespec="milliseconds"),
        "created_at": int(entry.created_at),
        "data": {"id": entry.object_id, **entry.data},
    }
    id = new_id("msg")
    session.execute(
        insert(WebhookDelivery).values(
            id=id,
            team_id=webhook.team_id,
            webhook_id=webhook.id,
            type=type,
            body=json.dumps(body, ensure_ascii=False, separators=(",", ":")),
            attempts=0,
            next_attempt_at=entry.created_at,
            created_at=entry.created_at,
        )
    )
    return id


def anything_due(session: Session) -> bool:
    """Whether `claim_due` would find something: to ask before taking a write lock."""
    due = select(WebhookDelivery.seq).where(WebhookDelivery.next_attempt_at <= clock()).limit(1)
    return session.scalar(due) is not None


def claim_due(session: Session, *, limit: int, seconds: float) -> list[Attempt]:
    """Up to `limit` deliveries that are due, oldest first; nobody else gets them for `seconds`."""
    due = (
        select(WebhookDelivery.seq)
        .where(WebhookDelivery.next_attempt_at <= clock())
        .order_by(WebhookDelivery.next_attempt_at, WebhookDelivery.seq)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    claimed = session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.seq.in_(due))
        .values(attempts=WebhookDelivery.attempts + 1, next_attempt_at=clock() + seconds)
        .returning(
            WebhookDelivery.seq,
            WebhookDelivery.id,
            WebhookDelivery.attempts,
            WebhookDelivery.webhook_id,
            WebhookDelivery.body,
        )
        .execution_options(synchronize_session=False)
    ).all()
    hooks = {
        hook.id: hook
        for hook in session.scalars(
            select(Webhook).where(Webhook.id.in_({row.webhook_id for row in claimed}))
        )
    }
    return [
        Attempt(row.id, row.attempts, hooks[row.webhook_id].url, hooks[row.webhook_id].secret, row.body)
        for row in sorted(claimed)
    ]


def delivered(session: Session, attempt: Attempt, status_code: int) -> None:
    """Also when another attempt is under way by now: the receiver has it."""
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == attempt.id)
        .values(delivered_at=clock(), next_attempt_at=None, status_code=status_code, error=None)
    )


def failed(session: Session, attempt: Attempt, *, status_code: int | None, error: str) -> None:
    """Try again later, or give up: after the last pause, and at once when the receiver is gone for good.

    Does nothing when a later attempt has been made or the delivery has arrived meanwhile.
    """
    gone = status_code == GONE
    pause = None if gone else pause_after(attempt.number)
    webhook_id = session.scalar(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == attempt.id,
            WebhookDelivery.attempts == attempt.number,
            WebhookDelivery.delivered_at.is_(None),
        )
        .values(
            next_attempt_at=None if pause is None else clock() + pause, status_code=status_code, error=error
        )
        .returning(WebhookDelivery.webhook_id)
    )
    if gone and webhook_id is not None:
        session.execute(
            update(Webhook).where(Webhook.id == webhook_id).values(disabled_because="It answered 410 Gone.")
        )


def purge(session: Session, *, older_than_seconds: float) -> int:
    """Forget deliveries that ended, one way or the other, and are that old; how many."""
    limit = db_now(session) - older_than_seconds
    found = session.execute(
        delete(WebhookDelivery)
        .where(WebhookDelivery.next_attempt_at.is_(None), WebhookDelivery.created_at < limit)
        .returning(WebhookDelivery.seq)
    )
    return len(found.all())


def _event_type(action: str, data: dict[str, Any]) -> EventType | None:
    if action == "update.create":
        return "update.created"
    if action == "version.publish":
        return "version.published"
    if action == "alias.move":
        return "alias.moved"
    if action in ("traffic.set", "traffic.clear"):
        return "traffic.changed"
    if action == "canary.rollback":
        return "canary.rolled_back"
    if action in ("update.finish", "update.cancel", "update.pause"):
        # A running update that is asked to cancel or pause has not done so yet.
        return _ENDED.get(data["status"])
    return None
