"""The lease: renewed while it works, and every way of losing it noticed."""

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from domain.errors import StaleFence
from registry import updates
from registry.claims import Claim
from tests.conftest_databases import NewDatabase
from tests.unit.worker import queued
from worker.lease import Interrupted, Lease, Stop


class Ledger(queued.Ledger):
    """One queued update and leases on it."""

    def granted(self, lease_seconds: float = 60.0) -> Claim:
        return self.must_claim(self.update, lease_seconds)

    def lease(self, claim: Claim, *, lease_seconds: float = 60.0, shutdown: bool = False) -> Lease:
        return Lease(
            self.sessions,
            claim,
            lease_seconds=lease_seconds,
            heartbeat_seconds=0.05,
            shutdown_requested=lambda: shutdown,
        )

    def lease_until(self) -> float:
        until = self.read(self.update).lease_until
        assert until is not None
        return until


@pytest.fixture
def ledger(new_sqlite: NewDatabase) -> Iterator[Ledger]:
    made = Ledger(new_sqlite(True))
    yield made
    made.engine.dispose()


def until(condition, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    """Wait until the condition holds; fail when it does not in time."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail("the condition never held")


def test_it_is_renewed_again_and_again(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted()) as lease:
        first = ledger.lease_until()
        until(lambda: ledger.lease_until() > first)
        second = ledger.lease_until()
        until(lambda: ledger.lease_until() > second)
        assert lease.stop() is None
        lease.check()


def test_cancel_and_pause_are_heard_and_cancel_is_more_urgent(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted()) as lease:
        with ledger.sessions.begin() as session:
            updates.request_pause(session, ledger.update, "user")
        until(lambda: lease.stop() == Stop.PAUSE)
        with ledger.sessions.begin() as session:
            updates.request_cancel(session, ledger.update, "user")
        until(lambda: lease.stop() == Stop.CANCEL)
        with pytest.raises(Interrupted) as interrupted:
            lease.check()
        assert interrupted.value.stop == Stop.CANCEL


def test_a_pause_that_is_withdrawn_is_no_reason_any_more(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted()) as lease:
        with ledger.sessions.begin() as session:
            updates.request_pause(session, ledger.update, "user")
        until(lambda: lease.stop() == Stop.PAUSE)
        with ledger.sessions.begin() as session:
            updates.resume(session, ledger.update, "user")
        until(lambda: lease.stop() is None)


def test_shutdown_of_the_worker_is_a_reason(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted(), shutdown=True) as lease:
        assert lease.stop() == Stop.SHUTDOWN


def test_a_successor_s_claim_is_noticed(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted()) as lease:
        with ledger.sessions.begin() as session:
            session.execute(text("UPDATE updates SET fence = fence + 1"))
        until(lambda: lease.stop() == Stop.LOST)


def test_entering_with_a_stale_claim_raises(ledger: Ledger) -> None:
    stale = ledger.granted()
    with ledger.sessions.begin() as session:
        session.execute(text("UPDATE updates SET lease_until = 0"))
    ledger.granted()
    with pytest.raises(StaleFence), ledger.lease(stale):
        pytest.fail("a stale claim was let in")


def test_a_database_that_stays_away_for_a_whole_lease_loses_it(ledger: Ledger) -> None:
    """Nobody says so: the worker's own clock must."""
    with ledger.lease(ledger.granted(0.5), lease_seconds=0.5) as lease:
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE updates RENAME TO away"))
        until(lambda: lease.stop() == Stop.LOST)


def test_a_database_that_is_away_for_less_than_a_lease_does_no_harm(ledger: Ledger) -> None:
    with ledger.lease(ledger.granted()) as lease:
        before = ledger.lease_until()
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE updates RENAME TO away"))
        threading.Event().wait(0.2)  # several heartbeats fail
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE away RENAME TO updates"))
        until(lambda: ledger.lease_until() > before)
        assert lease.stop() is None
