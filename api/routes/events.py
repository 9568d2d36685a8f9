"""Events of an update: a list, or a live stream that resumes where the client stopped."""

import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from api.context import Context, Ctx, Team
from api.lists import ListOf, Paging, listing
from api.replies import EventReply
from api.routes.updates import update_reply
from domain.errors import InvalidInput
from domain.update import FINISHED, Status
from registry import assistants, events, updates
from registry.tables import Event

router = APIRouter(tags=["updates"])

POLL_SECONDS = 0.5
KEEPALIVE_SECONDS = 15.0
_PAGE = 100


@router.get("/v1/updates/{update}/events", response_model=ListOf[EventReply])
async def list_events(
    update: str,
    request: Request,
    context: Ctx,
    team_id: Team,
    paging: Annotated[Paging, Depends()],
    last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> Response:
    """JSON, oldest first; or, with `Accept: text/event-stream`, every event until the update has ended.

    The stream ends with an event named `done` that holds the update. A client that reconnects after the
    end gets 204, which tells a browser to stop.
    """
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await run_in_threadpool(_page, context, team_id, update, paging)
    after = _seq(last_event_id if last_event_id is not None else paging.after)
    ended, rows = await run_in_threadpool(_next, context, team_id, update, after)
    if ended is not None and not rows and last_event_id is not None:
        return Response(status_code=204)
    return EventSourceResponse(
        _stream(context, team_id, update, after),
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


def _page(context: Context, team_id: str, update_id: str, paging: Paging) -> Response:
    with context.reads() as session:
        row = updates.get_update(session, team_id, update_id)
        found = events.list_events(session, row, _seq(paging.after), paging.limit + 1)
    shown = [_event_reply(event) for event in found[: paging.limit]]
    reply = listing(shown, has_more=len(found) > paging.limit)
    return Response(reply.model_dump_json(), media_type="application/json")


async def _stream(context: Context, team_id: str, update_id: str, after: int) -> AsyncIterator[bytes]:
    quiet_since = time.monotonic()
    while True:
        ended, rows = await run_in_threadpool(_next, context, team_id, update_id, after)
        for row in rows:
            yield format_sse_event(data_str=_event_reply(row).model_dump_json(), id=str(row.seq))
            after = row.seq
        if len(rows) == _PAGE:
            continue
        if ended is not None:
            yield format_sse_event(event="done", data_str=ended)
            return
        if rows:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= KEEPALIVE_SECONDS:
            yield KEEPALIVE_COMMENT
            quiet_since = time.monotonic()
        await anyio.sleep(POLL_SECONDS)


def _next(context: Context, team_id: str, update_id: str, after: int) -> tuple[str | None, list[Event]]:
    """The update as JSON once it has ended, and the events behind `after`.

    The state is read first: an update that has ended writes no more events.
    """
    with context.reads() as session:
        row = updates.get_update(session, team_id, update_id)
        ended = None
        if Status(row.status) in FINISHED:
            assistant = assistants.get_assistant(session, team_id, row.assistant_id)
            ended = update_reply(session, assistant, row).model_dump_json()
        return ended, events.list_events(session, row, after, _PAGE)


def _seq(after: str | None) -> int:
    """`after` is an event's id (`evt_<update>_<seq>`) or its bare number."""
    if after is None:
        return 0
    match = re.fullmatch(r"(?:evt_\w+_)?([0-9]{1,12})", after)
    if match is None:
        raise InvalidInput(f"'{after}' is not the id of an event.", param="after")
    return int(match.group(1))


def _event_reply(event: Event) -> EventReply:
    return EventReply(
        id=f"evt_{event.update_id.removeprefix('upd_')}_{event.seq}",
        seq=event.seq,
        type=event.type,
        level=event.level,
        message=event.message,
        data=event.data,
        created_at=int(event.created_at),
    )
