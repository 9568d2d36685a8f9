"""The audit log of a team."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.context import Reading, Team
from api.lists import ListOf, Paging, listing
from api.replies import AuditReply
from registry import audit
from registry.tables import AuditRow

router = APIRouter(tags=["audit"])


@router.get("/v1/audit_logs")
def list_audit(session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]) -> ListOf[AuditReply]:
    page = audit.list_audit(session, team_id, paging.after, paging.limit)
    return listing([_audit_reply(row) for row in page.rows], has_more=page.has_more)


def _audit_reply(row: AuditRow) -> AuditReply:
    return AuditReply(
        id=row.id,
        actor=row.actor,
        action=row.action,
        object_id=row.object_id,
        data=row.data,
        created_at=int(row.created_at),
    )
