"""Files of a team: what clients upload, and the metrics that jobs leave.

Their bytes are in the ledger: a file is whole or not there, and every copy of the ledger has it.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from domain.errors import CorruptArtifact, NotFound
from domain.ids import new_id
from registry import audit
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import File, FilePart

Purpose = Literal["fine-tune", "fine-tune-results"]
PART_BYTES = 1 << 20


def create_file(
    session: Session, *, team_id: str, filename: str, purpose: Purpose, content: bytes, actor: str
) -> File:
    file = File(
        id=new_id("file"),
        team_id=team_id,
        filename=filename,
        purpose=purpose,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        created_at=db_now(session),
    )
    session.add(file)
    session.flush()
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        part = content[start : start + PART_BYTES]
        session.execute(
            insert(FilePart).values(file_id=file.id, number=number, team_id=team_id, content=part)
        )
    audit.record(
        session,
        team_id=team_id,
        actor=actor,
        action="file.create",
        object_id=file.id,
        data={"filename": filename, "purpose": purpose, "bytes": file.size, "sha256": file.sha256},
    )
    return file


def get_file(session: Session, team_id: str, id: str) -> File:
    """Raises NotFound, also for another team's file."""
    file = session.scalars(select(File).where(File.team_id == team_id, File.id == id)).one_or_none()
    if file is None:
        raise NotFound(f"There is no file '{id}'.", param="file")
    return file


def list_files(
    session: Session,
    team_id: str,
    after: str | None,
    limit: int,
    *,
    purpose: str | None = None,
    newest_first: bool = True,
) -> Page[File]:
    rows = select(File).where(File.team_id == team_id)
    if purpose is not None:
        rows = rows.where(File.purpose == purpose)
    return read_page(
        session, rows, key=File.id, order=[File.seq], after=after, limit=limit, newest_first=newest_first
    )


def part(session: Session, file: File, number: int) -> bytes:
    """Up to PART_BYTES of the file, beginning at `number` times that. Raises NotFound once it is deleted."""
    content = session.scalar(
        select(FilePart.content).where(
            FilePart.team_id == file.team_id, FilePart.file_id == file.id, FilePart.number == number
        )
    )
    if content is None:
        raise NotFound(f"The file '{file.id}' was deleted.", param="file")
    return content


def content(session: Session, file: File) -> bytes:
    """All bytes of the file. Raises CorruptArtifact unless they are those that were stored."""
    found = b"".join(_parts(session, file))
    if hashlib.sha256(found).hexdigest() != file.sha256:
        raise CorruptArtifact(f"The file '{file.id}' differs from its sha256.", param=file.id)
    return found


def damaged(session: Session) -> Iterator[File]:
    """Files of all teams whose bytes are not those that were stored."""
    for file in session.scalars(select(File).order_by(File.seq)):
        digest = hashlib.sha256()
        for one in _parts(session, file):
            digest.update(one)
        if digest.hexdigest() != file.sha256:
            yield file


def delete_file(session: Session, file: File, *, actor: str) -> None:
    """The file and its bytes. Jobs made of it keep its id and their own copy of its demonstrations."""
    session.execute(delete(FilePart).where(FilePart.team_id == file.team_id, FilePart.file_id == file.id))
    deleted = session.execute(
        delete(File).where(File.team_id == file.team_id, File.id == file.id).returning(File.id)
    ).all()
    if not deleted:  # by another request, after this one had read it
        raise NotFound(f"There is no file '{file.id}'.", param="file")
    audit.record(
        session,
        team_id=file.team_id,
        actor=actor,
        action="file.delete",
        object_id=file.id,
        data={"filename": file.filename, "sha256": file.sha256},
    )


def _parts(session: Session, file: File) -> Iterator[bytes]:
    for number in range(-(-file.size // PART_BYTES)):
        found = session.scalar(
            select(FilePart.content).where(
                FilePart.team_id == file.team_id, FilePart.file_id == file.id, FilePart.number == number
            )
        )
        yield found or b""
