"""OpenAI's files: the demonstrations that fine-tuning jobs are made of, and the metrics that they leave."""

from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.context import ACTOR, Context, Ctx, Reading, Team
from api.idempotency import Creating
from api.lists import Listed, ListOf, listing
from api.openai_route import OpenAIRoute
from domain.chat_file import parse_chat_file
from domain.errors import InvalidInput
from registry import files
from registry.tables import File

router = APIRouter(tags=["openai"], route_class=OpenAIRoute)

MAX_FILENAME = 255
_FIELDS = frozenset({"file", "purpose"})


class FileReply(Listed):
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    """What is stored was checked before it was stored."""
    expires_at: None = None
    status_details: None = None


class FileDeletedReply(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


async def _known_fields(request: Request) -> None:
    for name in await request.form():
        if name not in _FIELDS:
            raise InvalidInput(f"The field '{name}' is not supported: files stay until deleted.", param=name)


@router.post("/v1/files", response_model=FileReply, dependencies=[Depends(_known_fields)])
def create_file(
    file: UploadFile, purpose: Annotated[str, Form()], team_id: Team, creation: Creating
) -> Response:
    """Multipart. The file must be JSON lines in OpenAI's chat format; every bad line is named."""
    if purpose != "fine-tune":
        raise InvalidInput(
            f"The purpose '{purpose[:80]}' is not supported; use 'fine-tune'.", param="purpose"
        )
    filename = _filename(file)
    content = file.file.read()
    parse_chat_file(content)

    def work(session: Session) -> FileReply:
        created = files.create_file(
            session, team_id=team_id, filename=filename, purpose="fine-tune", content=content, actor=ACTOR
        )
        return _reply(created)

    return creation.run(work, status_code=200)


@router.get("/v1/files")
def list_files(
    session: Reading,
    team_id: Team,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=128)] = None,
) -> ListOf[FileReply]:
    page = files.list_files(session, team_id, after, limit, purpose=purpose, newest_first=order == "desc")
    return listing([_reply(row) for row in page.rows], has_more=page.has_more)


@router.get("/v1/files/{file}")
def get_file(file: str, session: Reading, team_id: Team) -> FileReply:
    return _reply(files.get_file(session, team_id, file))


@router.get("/v1/files/{file}/content", response_class=StreamingResponse)
def get_file_content(file: str, context: Ctx, session: Reading, team_id: Team) -> Response:
    row = files.get_file(session, team_id, file)
    headers = {"content-length": str(row.size), "content-disposition": "attachment"}
    return StreamingResponse(_parts(context, row), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file}")
def delete_file(file: str, context: Ctx, team_id: Team) -> FileDeletedReply:
    """At any time: the jobs that were made of it have their own copy of its demonstrations."""
    with context.sessions.begin() as session:
        row = files.get_file(session, team_id, file)
        files.delete_file(session, row, actor=ACTOR)
        return FileDeletedReply(id=row.id)


def _parts(context: Context, file: File) -> Iterator[bytes]:
    """Each in a transaction of its own: a slow client holds none. A file deleted meanwhile breaks off."""
    for number in range(-(-file.size // files.PART_BYTES)):
        with context.reads() as session:
            content = files.part(session, file, number)
        yield content


def _filename(file: UploadFile) -> str:
    name = (file.filename or "").replace("\\", "/").rpartition("/")[2]
    if not name or "\0" in name or len(name) > MAX_FILENAME:
        raise InvalidInput(f"A file needs a name of 1 to {MAX_FILENAME} characters.", param="file")
    return name


def _reply(file: File) -> FileReply:
    return FileReply(
        id=file.id,
        bytes=file.size,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
    )
