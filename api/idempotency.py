"""Creating POSTs that may be sent twice: the second time gets the first one's stored reply.

The key, what the request creates and the stored reply are one transaction, so that no crash can leave a
key without its reply. A request of this process that is still running refuses its double at once; one
of another process makes it wait for the row.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile

from api.context import Context, Ctx, Team
from domain.errors import Conflict
from domain.failpoint import failpoint
from registry import idempotency
from registry.idempotency import Replay

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Creation:
    """One request that creates something, with or without an Idempotency-Key."""

    context: Context
    team_id: str
    key: str | None
    request_hash: str

    def replay(self) -> Response | None:
        """The stored reply of an earlier identical request; to ask before slow preparations.

        Raises InvalidInput for a key that came with another request.
        """
        if self.key is None:
            return None
        with self.context.reads() as session:
            stored = idempotency.find(session, self.team_id, self.key, self.request_hash)
        return None if stored is None else _replayed(stored)

    def run(self, work: Callable[[Session], BaseModel], *, status_code: int = 201) -> Response:
        """Run `work` in one transaction and commit it together with its reply.

        A repeated request gets the stored reply and `work` does not run. When `work` raises, nothing is
        stored and the key is free again. Raises InvalidInput for a key that came with another request.
        """
        with self.context.sessions.begin() as session:
            if self.key is not None:
                stored = idempotency.begin(session, self.team_id, self.key, self.request_hash)
                if stored is not None:
                    return _replayed(stored)
            text = work(session).model_dump_json()
            if self.key is not None:
                idempotency.complete(session, self.team_id, self.key, status_code, text)
            failpoint("api.committing")
        failpoint("api.committed")
        return _json(text, status_code)

    def amend(self, reply: BaseModel, *, status_code: int = 201) -> Response:
        """Replace the stored reply with one that tells what was only known after the commit."""
        text = reply.model_dump_json()
        if self.key is not None:
            with self.context.sessions.begin() as session:
                idempotency.complete(session, self.team_id, self.key, status_code, text)
        return _json(text, status_code)


async def _creation(
    request: Request,
    context: Ctx,
    team_id: Team,
    key: Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)] = None,
) -> AsyncIterator[Creation]:
    digest = hashlib.sha256()
    for part in (request.method, request.url.path, request.url.query):
        digest.update(part.encode() + b"\n")
    if request.headers.get("content-type", "").startswith("multipart/"):
        await _add_form(digest, request)
    else:
        body = await request.body()
        if len(body) > _CHUNK_BYTES:
            await run_in_threadpool(digest.update, body)
        else:
            digest.update(body)
    creation = Creation(context=context, team_id=team_id, key=key, request_hash=digest.hexdigest())
    if key is None:
        yield creation
        return
    # Touched by the event loop's thread only, hence no lock.
    running = context.idempotency_keys_in_flight
    if (team_id, key) in running:
        raise Conflict(
            "The first request with this key is still running.",
            param="Idempotency-Key",
            code="idempotency_in_flight",
        )
    running.add((team_id, key))
    try:
        yield creation
    finally:
        running.discard((team_id, key))


async def _add_form(digest: "hashlib._Hash", request: Request) -> None:
    """The fields rather than the body: a client that sends them again separates them differently."""
    for name, value in (await request.form()).multi_items():
        content = value if isinstance(value, str) else f"{value.filename}\n{await _sha256(value)}"
        digest.update(f"{name}\n{len(content)}\n{content}\n".encode())


async def _sha256(upload: UploadFile) -> str:
    found = hashlib.sha256()
    while chunk := await upload.read(_CHUNK_BYTES):
        found.update(chunk)
    await upload.seek(0)
    return found.hexdigest()


Creating = Annotated[Creation, Depends(_creation, scope="function")]


def _replayed(stored: Replay) -> Response:
    response = _json(stored.response, stored.status_code)
    response.headers["idempotent-replayed"] = "true"
    return response


def _json(text: str, status_code: int) -> Response:
    return Response(text, status_code, media_type="application/json")
