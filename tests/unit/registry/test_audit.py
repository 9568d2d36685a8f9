import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from registry import audit
from tests.unit.registry.steps import TEAM, Ledger


def record(ledger: Ledger, *objects: str) -> None:
    for name in objects:
        with ledger.begin() as session:
            audit.record(
                session, team_id=TEAM, actor="user", action="test.do", object_id=name, data={"n": name}
            )


def test_entries_are_listed_oldest_first_in_pages(ledger: Ledger) -> None:
    record(ledger, "a", "b", "c")
    with ledger.begin() as session:
        first = audit.list_audit(session, TEAM, None, 2)
        assert ([row.object_id for row in first.rows], first.has_more) == (["a", "b"], True)
        second = audit.list_audit(session, TEAM, first.rows[-1].id, 2)
        assert ([row.data for row in second.rows], second.has_more) == ([{"n": "c"}], False)


@pytest.mark.parametrize("verb", ["UPDATE audit_logs SET actor = 'x'", "DELETE FROM audit_logs"])
def test_entries_cannot_be_changed(ledger: Ledger, verb: str) -> None:
    record(ledger, "a")
    with pytest.raises(DBAPIError, match="append-only"), ledger.begin() as session:
        session.execute(text(verb))
    with ledger.begin() as session:
        assert [row.actor for row in audit.list_audit(session, TEAM, None, 5).rows] == ["user"]


def test_postgresql_refuses_to_truncate_the_log(new_postgresql) -> None:  # type: ignore[no-untyped-def]
    ledger = Ledger(new_postgresql(True))
    record(ledger, "a")
    with pytest.raises(DBAPIError, match="append-only"), ledger.begin() as session:
        session.execute(text("TRUNCATE audit_logs"))
    ledger.engine.dispose()
