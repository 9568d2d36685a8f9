"""Batches of demonstrations: JSON or JSON lines, all or nothing, every bad line named."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import JsonValue
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import BatchReply, DemonstrationReply
from domain import large_json
from domain.demonstration import Demonstration, parse_jsonl, parse_objects
from domain.errors import InvalidInput
from registry import assistants, demonstrations
from registry.demonstrations import BatchResult
from registry.tables import DemonstrationRow, Skill

router = APIRouter(tags=["demonstrations"])

JSON = "application/json"
JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/ndjson", "application/x-jsonlines")
MAX_LINES = 100_000
"""Of one batch: they are checked in memory and stored in one transaction."""

_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["demonstrations"],
                    "properties": {"demonstrations": {"type": "array", "items": {"type": "object"}}},
                }
            },
            "application/jsonl": {"schema": {"type": "string"}},
        },
    }
}


async def _raw_body(request: Request) -> bytes:
    return await request.body()


async def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@router.post(
    "/v1/assistants/{assistant}/skills/{skill}/demonstrations",
    status_code=201,
    response_model=BatchReply,
    openapi_extra=_REQUEST_BODY,
)
def accept_batch(
    assistant: str,
    skill: str,
    context: Ctx,
    team_id: Team,
    creation: Creating,
    body: Annotated[bytes, Depends(_raw_body)],
    media_type: Annotated[str, Depends(_media_type)],
    dry_run: Annotated[bool, Query(description="validate and count, store nothing")] = False,
) -> Response:
    stored = creation.replay()
    if stored is not None:
        return stored
    with context.reads() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        assistants.get_skill(session, owner, skill)
    # Parsing and counting tokens takes seconds for a large batch: outside of any transaction.
    numbered = _parse(body, media_type)
    context.prompts.require_fit(owner.base_model, owner.context_window, numbered)
    batch = [demonstration for _, demonstration in numbered]

    def work(session: Session) -> BatchReply:
        owner = assistants.get_assistant(session, team_id, assistant)
        row = assistants.get_skill(session, owner, skill)
        result = demonstrations.accept_batch(session, owner, row, batch, actor=ACTOR)
        return _batch_reply(row, result, stored=not dry_run)

    if not dry_run:
        return creation.run(work)
    with context.sessions() as session:
        reply = work(session)
        session.rollback()
    return Response(reply.model_dump_json(), 200, media_type=JSON)


@router.get("/v1/assistants/{assistant}/skills/{skill}/demonstrations")
def list_demonstrations(
    assistant: str,
    skill: str,
    session: Reading,
    team_id: Team,
    paging: Annotated[Paging, Depends()],
    split: Literal["train", "holdout"] | None = None,
) -> ListOf[DemonstrationReply]:
    owner = assistants.get_assistant(session, team_id, assistant)
    row = assistants.get_skill(session, owner, skill)
    page = demonstrations.list_demonstrations(session, row, paging.after, paging.limit, split)
    return listing([_demonstration_reply(row, one) for one in page.rows], has_more=page.has_more)


def _parse(body: bytes, media_type: str) -> list[tuple[int, Demonstration]]:
    """Demonstrations with their line numbers (of a JSON body: positions from 1)."""
    if media_type in JSON_LINES:
        _require_few(sum(bool(line.strip()) for line in body.split(b"\n")))
        return parse_jsonl(body)
    if media_type == JSON:
        values = _demonstrations_field(body)
        _require_few(len(values))
        return list(enumerate(parse_objects(values), start=1))
    raise HTTPException(
        415, f"Send {JSON} with a 'demonstrations' array, or {JSON_LINES[0]} with one object per line."
    )


def _demonstrations_field(body: bytes) -> list[JsonValue]:
    try:
        value = large_json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"The body is not valid JSON ({error}).", code="invalid_json") from error
    if not isinstance(value, dict) or not isinstance(value.get("demonstrations"), list):
        raise InvalidInput(
            'Send {"demonstrations": [...]}, an array of demonstrations.', param="demonstrations"
        )
    for name in value:
        if name != "demonstrations":
            raise InvalidInput(f"Unknown field '{name}'.", param=name)
    found: list[JsonValue] = value["demonstrations"]
    return found


def _require_few(count: int) -> None:
    if count > MAX_LINES:
        raise InvalidInput(
            f"A batch holds at most {MAX_LINES} demonstrations, not {count}.", param="demonstrations"
        )


def _batch_reply(skill: Skill, result: BatchResult, *, stored: bool) -> BatchReply:
    return BatchReply(
        id=result.batch.id if stored else None,
        skill=skill.name,
        dry_run=not stored,
        accepted=result.accepted,
        duplicates=result.duplicates,
        train=result.train,
        holdout=result.holdout,
        created_at=int(result.batch.created_at) if stored else None,
    )


def _demonstration_reply(skill: Skill, row: DemonstrationRow) -> DemonstrationReply:
    taught = Demonstration.model_validate(row.body)
    return DemonstrationReply(
        id=row.id,
        skill=skill.name,
        batch=row.batch_id,
        split="train" if row.split == "train" else "holdout",
        messages=taught.messages,
        response=taught.response,
        context=taught.context,
        answer=taught.answer,
        metadata=taught.metadata,
        created_at=int(row.created_at),
    )
