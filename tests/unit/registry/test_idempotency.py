import pytest
from sqlalchemy import text

from domain.errors import Conflict, InvalidInput
from registry import idempotency
from registry.idempotency import Replay
from tests.unit.registry.steps import TEAM, Ledger, race


def begin(ledger: Ledger, key: str = "k", request_hash: str = "h") -> Replay | None:
    with ledger.begin() as session:
        return idempotency.begin(session, TEAM, key, request_hash)


def test_a_completed_request_is_replayed(ledger: Ledger) -> None:
    assert begin(ledger) is None
    with ledger.begin() as session:
        idempotency.complete(session, TEAM, "k", 201, '{"id": 1}')
    assert begin(ledger) == Replay(201, '{"id": 1}')
    assert begin(ledger, key="other") is None
    with ledger.begin() as session:
        session.execute(text("INSERT INTO teams (id, name, created_at) VALUES ('team_b', 'b', 0)"))
        assert idempotency.begin(session, "team_b", "k", "another") is None


def test_a_request_in_flight_is_refused_until_abandoned(ledger: Ledger) -> None:
    begin(ledger)
    with pytest.raises(Conflict) as caught:
        begin(ledger)
    assert (caught.value.code, caught.value.param) == ("idempotency_in_flight", "Idempotency-Key")
    with ledger.begin() as session:
        idempotency.abandon(session, TEAM, "k")
    assert begin(ledger) is None


def test_a_completed_request_cannot_be_abandoned(ledger: Ledger) -> None:
    begin(ledger)
    with ledger.begin() as session:
        idempotency.complete(session, TEAM, "k", 200, "{}")
        idempotency.abandon(session, TEAM, "k")
    assert begin(ledger) == Replay(200, "{}")


def test_another_request_under_the_key_is_refused(ledger: Ledger) -> None:
    begin(ledger)
    with pytest.raises(InvalidInput) as caught:
        begin(ledger, request_hash="other")
    assert (caught.value.code, caught.value.param) == ("idempotency_mismatch", "Idempotency-Key")


def test_a_look_only_looks(ledger: Ledger) -> None:
    def find(request_hash: str = "h") -> Replay | None:
        with ledger.reads() as session:  # in which a write would fail
            return idempotency.find(session, TEAM, "k", request_hash)

    assert find() is None
    begin(ledger)
    with pytest.raises(Conflict, match="still running"):
        find()
    with ledger.begin() as session:
        idempotency.complete(session, TEAM, "k", 201, "{}")
    assert find() == Replay(201, "{}")
    with pytest.raises(InvalidInput, match="another request"):
        find("other")


def test_of_many_at_once_one_is_the_first(ledger: Ledger) -> None:
    results = race([lambda: begin(ledger)] * 6)
    assert results.count(None) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 5


def test_a_key_whose_transaction_was_rolled_back_is_new(ledger: Ledger) -> None:
    session = ledger.sessions()
    assert idempotency.begin(session, TEAM, "k", "h") is None
    session.rollback()
    session.close()
    assert begin(ledger) is None
