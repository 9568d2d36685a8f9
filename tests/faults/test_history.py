"""The checker of histories finds what it is there to find."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from artifacts.store import ArtifactStore
from registry.tables import Assistant
from tests.conftest_databases import NewDatabase
from tests.faults.history import violations
from tests.unit.registry.steps import Ledger, lines


class Trusting(ArtifactStore):
    """These versions have no files."""

    def verify(self, version_id: str, manifest_sha256: str) -> Path:
        return self.root


class Line:
    """One assistant that learned twice."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.assistant: Assistant = ledger.assistant()
        skill = ledger.skill(self.assistant)
        self.ids = [ledger.learn(self.assistant, skill, lines(n, n + 1)).update_id for n in (0, 1)]

    def break_by(self, *statements: str) -> list[str]:
        with self.ledger.begin() as session:
            for statement in statements:
                session.execute(text(statement), {"one": self.ids[0], "two": self.ids[1]})
            return violations(session, Trusting(Path()))


@pytest.fixture
def line(new_sqlite: NewDatabase) -> Iterator[Line]:
    made = Line(Ledger(new_sqlite(True)))
    yield made
    made.ledger.engine.dispose()


def test_a_sound_history_has_none(line: Line) -> None:
    assert line.break_by() == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE updates SET status = 'cancelled' WHERE id = :one", "is cancelled and published"),
        ("UPDATE updates SET version_id = NULL WHERE id = :one", "has versions"),
        ("UPDATE updates SET seq = seq + 10 WHERE id = :one", "started before"),
        ("UPDATE versions SET number = 7 WHERE update_id = :two", "has versions [0, 1, 7]"),
        ("UPDATE events SET data = '{}' WHERE update_id = :one AND message = 'Succeeded.'", "ran beside"),
        (
            "UPDATE events SET data = json_set(data, '$.fence', 2) WHERE update_id = :one "
            "AND message = 'Started.'",
            "was published by another fence than 2",
        ),
        (
            "INSERT INTO events (team_id, update_id, seq, type, level, message, data, created_at) "
            "SELECT team_id, update_id, 99, type, level, message, data, 0 FROM events "
            "WHERE update_id = :one AND type = 'verdict'",
            "was published 2 times",
        ),
        (
            "INSERT INTO events (team_id, update_id, seq, type, level, message, data, created_at) "
            "SELECT team_id, update_id, 99, type, level, message, data, 0 FROM events "
            "WHERE update_id = :one AND message = 'Started.'",
            "ran again after its end",
        ),
        ("UPDATE aliases SET revision = 9", "lost a move"),
        (
            "UPDATE aliases SET version_id = (SELECT id FROM versions WHERE number = 0)",
            "is not where its history ends",
        ),
    ],
)
def test_a_breach_is_named(line: Line, statement: str, found: str) -> None:
    assert found in "; ".join(line.break_by(statement))


def test_a_version_without_its_files_is_torn(line: Line, tmp_path: Path) -> None:
    with line.ledger.begin() as session:
        found = violations(session, ArtifactStore(tmp_path))
    assert len(found) == 2
    assert all("is visible but torn" in one for one in found)
