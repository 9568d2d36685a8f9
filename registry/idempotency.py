"""Idempotency keys: the same request again gets the first one's reply.

`begin`, the request's own verbs and `complete` may share one transaction (then a second request waits for
it), or `begin` may be committed first (then a second one is refused while the first is in flight).
"""

from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.errors import Conflict, InvalidInput
from registry.session import db_now, violates_unique
from registry.tables import IdempotencyKey

PARAM = "Idempotency-Key"


@dataclass(frozen=True)
class Replay:
    status_code: int
    response: str


def find(session: Session, team_id: str, key: str, request_hash: str) -> Replay | None:
    """The stored reply of a known key, None for a new one; only looks, and waits for nobody.

    Raises what `begin` raises.
    """
    known = session.execute(
        select(IdempotencyKey.request_hash, IdempotencyKey.status_code, IdempotencyKey.response).where(
            IdempotencyKey.team_id == team_id, IdempotencyKey.key == key
        )
    ).one_or_none()
    if known is None:
        return None
    if known.request_hash != request_hash:
        raise InvalidInput("This key was used for another request.", param=PARAM, code="idempotency_mismatch")
    if known.status_code is None or known.response is None:
        raise Conflict(
            "The first request with this key is still running.", param=PARAM, code="idempotency_in_flight"
        )
    return Replay(known.status_code, known.response)


def begin(session: Session, team_id: str, key: str, request_hash: str) -> Replay | None:
    """None for a new key, now in flight; the stored reply for a known one.

    Raises Conflict(code="idempotency_in_flight"), and InvalidInput(code="idempotency_mismatch") when the
    key came with another request.
    """
    row = IdempotencyKey(team_id=team_id, key=key, request_hash=request_hash, created_at=db_now(session))
    try:
        with session.begin_nested():
            session.add(row)
            session.flush()
    except IntegrityError as error:
        if not violates_unique(error):
            raise
    else:
        return None
    stored = find(session, team_id, key, request_hash)
    assert stored is not None  # its row was in the way
    return stored


def complete(session: Session, team_id: str, key: str, status_code: int, response: str) -> None:
    """Keep the reply for later requests with the key."""
    session.execute(
        update(IdempotencyKey)
        .where(IdempotencyKey.team_id == team_id, IdempotencyKey.key == key)
        .values(status_code=status_code, response=response)
    )


def purge(session: Session, *, older_than_seconds: float) -> int:
    """Forget keys that old; how many. The same request again is then a new one."""
    found = session.execute(
        delete(IdempotencyKey)
        .where(IdempotencyKey.created_at < db_now(session) - older_than_seconds)
        .returning(IdempotencyKey.key)
    )
    return len(found.all())


def abandon(session: Session, team_id: str, key: str) -> None:
    """Forget a key whose request stored nothing, so that it can be tried again."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.team_id == team_id,
            IdempotencyKey.key == key,
            IdempotencyKey.status_code.is_(None),
        )
    )
