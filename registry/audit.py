"""The audit log: every mutation, written in the mutation's own transaction and never changed.

What webhooks hear of is put into the outbox here, so that no verb can forget it.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.ids import new_id
from registry import outbox
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import AuditRow


def record(
    session: Session, *, team_id: str, actor: str, action: str, object_id: str, data: dict[str, Any]
) -> AuditRow:
    """`action` is `noun.verb` (`alias.move`); `data` is what a reader needs to understand it."""
    row = AuditRow(
        id=new_id("audit"),
        team_id=team_id,
        actor=actor,
        action=action,
        object_id=object_id,
        data=data,
        created_at=db_now(session),
    )
    session.add(row)
    session.flush()
    outbox.announce(session, row)
    return row


def list_audit(session: Session, team_id: str, after: str | None, limit: int) -> Page[AuditRow]:
    return read_page(
        session,
        select(AuditRow).where(AuditRow.team_id == team_id),
        key=AuditRow.id,
        order=[AuditRow.seq],
        after=after,
        limit=limit,
    )
