"""Sessions that only read: no waiting, one state of the ledger, no writes; on both databases."""

import threading
import time

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from registry.tables import AuditRow, Batch, DemonstrationRow
from tests.unit.registry.steps import Ledger, lines, race

RENAME = text("UPDATE teams SET name = 'changed'")
NAME = text("SELECT name FROM teams")


@pytest.fixture
def reads(ledger: Ledger) -> sessionmaker[Session]:
    return ledger.reads


def test_a_reader_does_not_wait_for_a_writer(ledger: Ledger, reads: sessionmaker[Session]) -> None:
    with ledger.begin() as writer:
        writer.execute(RENAME)
        started_at = time.monotonic()
        with reads() as reader:
            assert reader.execute(NAME).scalar_one() == "default"
        assert time.monotonic() - started_at < 25  # a writer waits 30 s for the lock
    with reads() as reader:
        assert reader.execute(NAME).scalar_one() == "changed"


def test_a_writer_does_not_wait_for_a_reader(ledger: Ledger, reads: sessionmaker[Session]) -> None:
    with reads() as reader:
        assert reader.execute(NAME).scalar_one() == "default"
        started_at = time.monotonic()
        with ledger.begin() as writer:
            writer.execute(RENAME)
        assert time.monotonic() - started_at < 25
        assert reader.execute(NAME).scalar_one() == "default", "one session saw two states"


def test_a_reader_cannot_write(ledger: Ledger, reads: sessionmaker[Session]) -> None:
    with pytest.raises(DBAPIError, match=r"readonly|read-only"), reads() as reader:
        reader.execute(RENAME)
    with ledger.begin() as session:
        assert session.execute(NAME).scalar_one() == "default"


def test_the_same_connection_writes_again_after_a_reader(
    ledger: Ledger, reads: sessionmaker[Session]
) -> None:
    opened = []
    event.listen(ledger.engine, "connect", lambda *_: opened.append(1))
    for name in ("one", "two"):
        with reads() as reader:
            reader.execute(NAME)
        with ledger.begin() as session:
            session.execute(text("UPDATE teams SET name = :name"), {"name": name})
    with reads() as reader:
        assert reader.execute(NAME).scalar_one() == "two"
    assert len(opened) <= 1


def test_readers_beside_a_writer_see_whole_transactions(ledger: Ledger, reads: sessionmaker[Session]) -> None:
    """Every batch is one transaction of a batch row, 3 demonstrations and an audit entry."""
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    batches = 60
    ended = threading.Event()

    def write() -> int:
        try:
            for number in range(batches):
                ledger.teach(assistant, skill, lines(3 * number, 3 * number + 3))
        finally:
            ended.set()
        return batches

    def read() -> list[int]:
        seen = []
        while True:
            last_round = ended.is_set()
            with reads() as session:
                stored = session.execute(select(func.count()).select_from(DemonstrationRow)).scalar_one()
                told = session.execute(select(func.coalesce(func.sum(Batch.accepted), 0))).scalar_one()
                audited = session.execute(
                    select(func.count()).where(AuditRow.action == "batch.accept")
                ).scalar_one()
            assert (stored, audited) == (told, told / 3)
            seen.append(audited)
            if last_round:
                return seen

    written, *seen = race([write, read, read, read])
    assert written == batches
    for counts in seen:
        assert isinstance(counts, list), counts
        assert counts == sorted(counts), "a later reader saw less"
        assert counts[-1] == batches
