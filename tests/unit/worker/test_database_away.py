"""A worker and the dispatcher while PostgreSQL's network swallows every packet, and after it."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from domain.errors import StaleFence
from registry import postgresql
from registry.tables import Event
from tests.conftest_databases import NewDatabase
from tests.swallowing_proxy import BOUND, CONNECT, SILENCE, SwallowingProxy, proxied, swallowing
from tests.unit.worker.queued import Ledger
from worker.dispatcher import Dispatcher
from worker.journal import Journal
from worker.lease import Lease, Stop

OUTAGE = SILENCE + 2 * CONNECT + 1
"""Seconds, in which every wait for the database ends once."""


@pytest.fixture
def path(
    new_postgresql: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Ledger, SwallowingProxy]]:
    monkeypatch.setattr("worker.lease.AGAIN_SECONDS", 0.1)
    monkeypatch.setattr("worker.journal.AGAIN_SECONDS", 0.1)
    with proxied(new_postgresql(True)) as (url, proxy):
        ledger = Ledger(url)
        yield ledger, proxy
        ledger.engine.dispose()


def lease(ledger: Ledger, seconds: float) -> Lease:
    return Lease(
        ledger.sessions,
        ledger.must_claim(ledger.update, seconds),
        lease_seconds=seconds,
        heartbeat_seconds=0.2,
        shutdown_requested=lambda: False,
    )


def lease_until(ledger: Ledger) -> float:
    until = ledger.read(ledger.update).lease_until
    assert until is not None
    return until


def until(condition, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    """Wait until the condition holds; not while the database counts as away."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OperationalError):
            if condition():
                return
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def test_a_lease_outlasts_a_shorter_outage(path: tuple[Ledger, SwallowingProxy]) -> None:
    ledger, proxy = path
    with lease(ledger, 60.0) as held:
        before = lease_until(ledger)
        with swallowing(proxy):
            time.sleep(OUTAGE)
            assert held.stop() is None
        until(lambda: lease_until(ledger) > before)


def test_a_longer_outage_loses_the_lease_and_keeps_nobody_waiting(
    path: tuple[Ledger, SwallowingProxy],
) -> None:
    ledger, proxy = path
    with ExitStack() as outage:
        with lease(ledger, 2.0) as held:
            outage.enter_context(swallowing(proxy))
            until(lambda: held.stop() == Stop.LOST)
            leaving = time.monotonic()
        assert time.monotonic() - leaving < BOUND
    until(lambda: ledger.claim(ledger.update.id) is not None)


def test_what_a_worker_tells_waits_for_the_database(path: tuple[Ledger, SwallowingProxy]) -> None:
    ledger, proxy = path
    claim = ledger.must_claim(ledger.update, 60.0)
    journal = Journal(ledger.sessions, claim, lambda: None)
    journal.tell("before")
    with swallowing(proxy):
        telling = threading.Thread(target=journal.tell, args=("meanwhile",), daemon=True)
        telling.start()
        telling.join(OUTAGE)
        assert telling.is_alive()
    telling.join(60)
    assert not telling.is_alive()
    with ledger.reads() as session:
        told = session.scalar(select(func.count()).where(Event.message == "meanwhile"))
    # Twice if the first attempt's commit came through unheard.
    assert told in (1, 2)


def test_what_a_worker_tells_does_not_outwait_its_lease(path: tuple[Ledger, SwallowingProxy]) -> None:
    ledger, proxy = path
    journal = Journal(ledger.sessions, ledger.must_claim(ledger.update, 60.0), lambda: Stop.LOST)
    with swallowing(proxy):
        began = time.monotonic()
        with pytest.raises(OperationalError):
            journal.tell("too late")
        assert time.monotonic() - began < BOUND


def test_a_stale_claim_tells_nothing(path: tuple[Ledger, SwallowingProxy]) -> None:
    ledger, _ = path
    journal = Journal(ledger.sessions, ledger.must_claim(ledger.update, 0.0), lambda: None)
    ledger.must_claim(ledger.update, 60.0)
    with pytest.raises(StaleFence):
        journal.tell("of old")


def test_a_sweep_ends_in_time_and_the_next_one_nudges(path: tuple[Ledger, SwallowingProxy]) -> None:
    ledger, proxy = path
    sent: list[str] = []
    dispatcher = Dispatcher(ledger.reads, send=sent.append, pending=lambda: 0)
    with swallowing(proxy):
        began = time.monotonic()
        with pytest.raises(OperationalError):
            dispatcher.sweep()
        assert time.monotonic() - began < BOUND
    time.sleep(postgresql.AGAIN_SECONDS)
    assert dispatcher.sweep() == [ledger.update.id] == sent
