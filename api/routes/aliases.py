"""Aliases: which version a name points at, its history, promotion and rollback."""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.fields import Body, Name, Text, VersionRef
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import AliasMoveReply, AliasReply, MovedReply
from api.rollback import await_serving, plan_rollback
from api.routes.assistants import VersionNames
from api.version_files import verify_files
from domain.errors import InvalidInput, RevisionMismatch
from domain.version import CHAMPION
from registry import aliases, assistants, versions
from registry.serving import serving_states
from registry.tables import Alias, AliasMove, Assistant

router = APIRouter(tags=["aliases"])

ANY = "*"


class AliasTarget(Body):
    version: VersionRef
    reason: Text = ""
    override: bool = False
    """Let a version through that its gate blocked."""


class Rollback(Body):
    to: VersionRef | None = None
    """Default: what champion pointed at before the current version came."""
    reason: Text = ""


@router.get("/v1/assistants/{assistant}/aliases")
def list_aliases(assistant: str, session: Reading, team_id: Team) -> ListOf[AliasReply]:
    owner = assistants.get_assistant(session, team_id, assistant)
    rows = aliases.list_aliases(session, owner)
    return listing(_alias_replies(session, owner, rows), has_more=False)


@router.get("/v1/assistants/{assistant}/aliases/{alias}")
def get_alias(assistant: str, alias: str, session: Reading, team_id: Team, response: Response) -> AliasReply:
    """The ETag is the revision: send it back as If-Match to move only what was seen."""
    owner = assistants.get_assistant(session, team_id, assistant)
    row = aliases.get_alias(session, owner, alias)
    response.headers["etag"] = _etag(row.revision)
    [reply] = _alias_replies(session, owner, [row])
    return reply


@router.put("/v1/assistants/{assistant}/aliases/{alias}")
def put_alias(
    assistant: str,
    alias: Name,
    body: AliasTarget,
    context: Ctx,
    team_id: Team,
    response: Response,
    if_match: Annotated[str | None, Header(max_length=64)] = None,
    if_none_match: Annotated[str | None, Header(max_length=64)] = None,
) -> MovedReply:
    """Point the alias at a version, creating it when it is new, and wait up to 10 s until it answers.

    `If-Match: "3"` moves only an alias at revision 3, `If-Match: *` only one that exists,
    `If-None-Match: *` only creates.
    """
    expected = _expected_revision(if_match, if_none_match)
    with context.reads() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        if if_match == ANY and alias not in [row.name for row in aliases.list_aliases(session, owner)]:
            raise RevisionMismatch(f"There is no alias '{alias}' yet.", param="If-Match")
        version = versions.get_version(session, owner, body.version)
    verify_files(context, version)
    with context.sessions.begin() as session:
        move = aliases.move_alias(
            session,
            owner,
            alias,
            version,
            kind="promote",
            reason=body.reason,
            actor=ACTOR,
            expected_revision=expected,
            force=body.override,
        )
        reply = _moved_reply(session, move)
    response.headers["etag"] = _etag(reply.revision)
    serving = await_serving(context, owner.id, alias, version.id)
    return reply.model_copy(update={"serving": serving})


@router.get("/v1/assistants/{assistant}/aliases/{alias}/history")
def alias_history(
    assistant: str, alias: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[AliasMoveReply]:
    """Newest first."""
    owner = assistants.get_assistant(session, team_id, assistant)
    page = aliases.history(session, owner, alias, paging.after, paging.limit)
    ids = [id for row in page.rows for id in (row.from_version_id, row.to_version_id)]
    names = VersionNames(session, ids)
    return listing([_move_reply(names, row) for row in page.rows], has_more=page.has_more)


@router.post("/v1/assistants/{assistant}/rollback", response_model=MovedReply)
def roll_back(
    assistant: str, context: Ctx, team_id: Team, creation: Creating, body: Rollback | None = None
) -> Response:
    """Point champion at an earlier version and wait up to 10 s until it answers."""
    stored = creation.replay()
    if stored is not None:
        return stored
    asked = body or Rollback()
    plan = plan_rollback(context, team_id, assistant, asked.to)
    replies: list[MovedReply] = []

    def work(session: Session) -> MovedReply:
        move = plan.carry_out(session, reason=asked.reason, actor=ACTOR)
        replies.append(_moved_reply(session, move))
        return replies[-1]

    response = creation.run(work, status_code=200)
    if not replies:
        return response
    serving = await_serving(context, plan.assistant.id, CHAMPION, plan.target.id)
    return creation.amend(replies[-1].model_copy(update={"serving": serving}), status_code=200)


def _expected_revision(if_match: str | None, if_none_match: str | None) -> int | None:
    """The revision that a move requires: 0 for an alias that must be new, None for any."""
    if if_none_match is not None:
        if if_none_match != ANY or if_match is not None:
            raise InvalidInput("Send 'If-None-Match: *', or If-Match with an ETag.", param="If-None-Match")
        return 0
    if if_match is None or if_match == ANY:
        return None
    match = re.fullmatch(r'"([0-9]{1,9})"', if_match.strip())
    if match is None or int(match.group(1)) == 0:
        raise RevisionMismatch(f"{if_match} is no ETag that an alias has had.", param="If-Match")
    return int(match.group(1))


def _etag(revision: int) -> str:
    return f'"{revision}"'


def _alias_replies(session: Session, assistant: Assistant, rows: Sequence[Alias]) -> list[AliasReply]:
    states = serving_states(session, assistant)
    shown = [row.version_id for row in rows] + [state.version_id for state in states.values()]
    names = VersionNames(session, shown)
    replies = []
    for row in rows:
        state = states.get(row.name)
        replies.append(
            AliasReply(
                id=row.name,
                assistant=assistant.name,
                alias=row.name,
                version=names(row.version_id),
                revision=row.revision,
                serving_version=None if state is None else names.maybe(state.version_id),
                serving_error=None if state is None else state.error,
                updated_at=int(row.updated_at),
            )
        )
    return replies


def _move_reply(names: VersionNames, move: AliasMove) -> AliasMoveReply:
    return AliasMoveReply(
        id=move.id,
        alias=move.alias,
        from_version=names.maybe(move.from_version_id),
        to_version=names(move.to_version_id),
        revision=move.revision,
        kind=move.kind,
        reason=move.reason,
        actor=move.actor,
        update=move.update_id,
        created_at=int(move.created_at),
    )


def _moved_reply(session: Session, move: AliasMove) -> MovedReply:
    names = VersionNames(session, [move.from_version_id, move.to_version_id])
    return MovedReply(
        id=move.id,
        alias=move.alias,
        from_version=names.maybe(move.from_version_id),
        to_version=names(move.to_version_id),
        revision=move.revision,
        serving=False,
    )
