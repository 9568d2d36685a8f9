"""How an assistant's traffic is shared out between champion, canary and shadow."""

import re
from typing import Annotated, cast

from fastapi import APIRouter, Header, Response
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.replies import TrafficFiguresReply, TrafficReply
from api.routes.assistants import VersionNames
from domain.errors import RevisionMismatch
from domain.traffic import CanaryRollback, Role, Traffic
from registry import aliases, assistants, traffic, traffic_figures
from registry.session import db_now
from registry.tables import Assistant, TrafficFigures, TrafficRow
from serving.latency import quantile

router = APIRouter(tags=["traffic"])

PATH = "/v1/assistants/{assistant}/traffic"
IfMatch = Annotated[str | None, Header(max_length=64)]


@router.get(PATH)
def get_traffic(assistant: str, session: Reading, team_id: Team, response: Response) -> TrafficReply:
    """With figures that are at most two seconds old. The ETag is the revision, 0 before the first change."""
    owner = assistants.get_assistant(session, team_id, assistant)
    return _reply(session, owner, traffic.get_traffic(session, owner), response)


@router.put(PATH)
def put_traffic(
    assistant: str, body: Traffic, context: Ctx, team_id: Team, response: Response, if_match: IfMatch = None
) -> TrafficReply:
    """Replaces what was; a side that is left out gets nothing."""
    return _set(assistant, body, context, team_id, response, if_match)


@router.delete(PATH)
def delete_traffic(
    assistant: str, context: Ctx, team_id: Team, response: Response, if_match: IfMatch = None
) -> TrafficReply:
    """All of it to the champion again; figures and a cooldown stay."""
    return _set(assistant, Traffic(), context, team_id, response, if_match)


def _set(
    assistant: str, wanted: Traffic, context: Ctx, team_id: str, response: Response, if_match: str | None
) -> TrafficReply:
    expected = _expected_revision(if_match)
    with context.sessions.begin() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        row = traffic.set_traffic(session, owner, wanted, actor=ACTOR, expected_revision=expected)
        reply = _reply(session, owner, row, response)
    context.keeper.refresh()
    return reply


def _expected_revision(if_match: str | None) -> int | None:
    """None: any. There is always something to match, so `*` is any too."""
    if if_match is None or if_match.strip() == "*":
        return None
    match = re.fullmatch(r'"([0-9]{1,9})"', if_match.strip())
    if match is None:
        raise RevisionMismatch(f"{if_match} is no ETag that the traffic has had.", param="If-Match")
    return int(match.group(1))


def _reply(
    session: Session, assistant: Assistant, row: TrafficRow | None, response: Response
) -> TrafficReply:
    wanted = Traffic() if row is None else traffic.shares(row)
    figures = traffic_figures.list_figures(session, assistant)
    targets = {alias.name: alias.version_id for alias in aliases.list_aliases(session, assistant)}
    names = VersionNames(session, [*targets.values(), *(one.version_id for one in figures)])
    revision = 0 if row is None else row.revision
    response.headers["etag"] = f'"{revision}"'
    cooling = row is not None and row.cooldown_until is not None and row.cooldown_until > db_now(session)
    return TrafficReply(
        assistant=assistant.name,
        revision=revision,
        canary=wanted.canary,
        canary_version=None if wanted.canary is None else names.maybe(targets.get(wanted.canary.alias)),
        shadow=wanted.shadow,
        shadow_version=None if wanted.shadow is None else names.maybe(targets.get(wanted.shadow.alias)),
        cooldown_until=None if row is None or not cooling else int(row.cooldown_until or 0),
        last_rollback=(
            None
            if row is None or row.last_rollback is None
            else CanaryRollback.model_validate(row.last_rollback)
        ),
        rolled_back_at=None if row is None or row.rolled_back_at is None else int(row.rolled_back_at),
        figures=[_figures_reply(one, names(one.version_id)) for one in figures],
        updated_at=None if row is None else int(row.updated_at),
    )


def _figures_reply(row: TrafficFigures, version: str) -> TrafficFiguresReply:
    latency = {int(bucket): count for bucket, count in row.latency.items()}
    return TrafficFiguresReply(
        role=cast(Role, row.role),
        version=version,
        requests=row.requests,
        errors=row.errors,
        error_rate=_ratio(row.errors, row.requests),
        latency_p50=quantile(latency, 0.5),
        latency_p95=quantile(latency, 0.95),
        dropped=row.dropped,
        compared=row.compared,
        identical=_ratio(row.identical, row.compared),
        rouge_l=_ratio(row.rouge_l, row.compared),
        agreement=_ratio(row.agreed, row.graded),
        updated_at=int(row.updated_at),
    )


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
