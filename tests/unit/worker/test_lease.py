"""The lease: renewed while it works, and every way of losing it noticed."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from domain.demonstration import DemonstrationLine
from domain.errors import StaleFence
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.skill import ExactGrader
from registry import assistants, demonstrations, updates
from registry.claims import Claim
from registry.session import make_engine, make_sessions, upgrade
from worker.lease import Interrupted, Lease, Stop

TEAM = "team_default"


class Ledger:
    def __init__(self, url: str) -> None:
        self.engine: Engine = make_engine(url)
        self.sessions: sessionmaker[Session] = make_sessions(self.engine)
        with self.sessions.begin() as session:
            assistant = assistants.create_assistant(
                session,
                team_id=TEAM,
                name="helper",
                base_model="tiny",
                parameter_count=1000,
                context_window=2048,
                actor="user",
            )
            skill = assistants.create_skill(
                session,
                assistant,
                name="route",
                description="",
                grader=ExactGrader(),
                holdout_fraction=0.0,
                actor="user",
            )
            line = DemonstrationLine(prompt="where?", response="there").to_demonstration()
            demonstrations.accept_batch(session, assistant, skill, [line], actor="user")
            self.update = updates.create_update(
                session,
                assistant,
                skills=None,
                recipe=Recipe(),
                gate=GateRules(),
                publish="auto",
                actor="user",
            )

    def claim(self, lease_seconds: float = 60.0) -> Claim:
        with self.sessions.begin() as session:
            claim = updates.claim(session, self.update.id, worker="w", lease_seconds=lease_seconds)
        assert claim is not None
        return claim

    def lease(self, claim: Claim, *, lease_seconds: float = 60.0, shutdown: bool = False) -> Lease:
        return Lease(
            self.sessions,
            claim,
            lease_seconds=lease_seconds,
            heartbeat_seconds=0.05,
            shutdown_requested=lambda: shutdown,
        )

    def lease_until(self) -> float:
        with self.sessions.begin() as session:
            until = updates.get_update(session, TEAM, self.update.id).lease_until
        assert until is not None
        return until


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    url = f"sqlite:///{tmp_path / 'ratchet.db'}"
    upgrade(url)
    made = Ledger(url)
    yield made
    made.engine.dispose()


def until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Wait until the condition holds; fail when it does not in time."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail("the condition never held")


def test_it_is_renewed_again_and_again(ledger: Ledger) -> None:
    with ledger.lease(ledger.claim()) as lease:
        first = ledger.lease_until()
        until(lambda: ledger.lease_until() > first)
        second = ledger.lease_until()
        until(lambda: ledger.lease_until() > second)
        assert lease.stop() is None
        lease.check()


def test_cancel_and_pause_are_heard_and_cancel_is_more_urgent(ledger: Ledger) -> None:
    with ledger.lease(ledger.claim()) as lease:
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
    with ledger.lease(ledger.claim()) as lease:
        with ledger.sessions.begin() as session:
            updates.request_pause(session, ledger.update, "user")
        until(lambda: lease.stop() == Stop.PAUSE)
        with ledger.sessions.begin() as session:
            updates.resume(session, ledger.update, "user")
        until(lambda: lease.stop() is None)


def test_shutdown_of_the_worker_is_a_reason(ledger: Ledger) -> None:
    with ledger.lease(ledger.claim(), shutdown=True) as lease:
        assert lease.stop() == Stop.SHUTDOWN


def test_a_successor_s_claim_is_noticed(ledger: Ledger) -> None:
    with ledger.lease(ledger.claim()) as lease:
        with ledger.sessions.begin() as session:
            session.execute(text("UPDATE updates SET fence = fence + 1"))
        until(lambda: lease.stop() == Stop.LOST)


def test_entering_with_a_stale_claim_raises(ledger: Ledger) -> None:
    stale = ledger.claim()
    with ledger.sessions.begin() as session:
        session.execute(text("UPDATE updates SET lease_until = 0"))
    ledger.claim()
    with pytest.raises(StaleFence), ledger.lease(stale):
        pytest.fail("a stale claim was let in")


def test_a_database_that_stays_away_for_a_whole_lease_loses_it(ledger: Ledger) -> None:
    """Nobody says so: the worker's own clock must."""
    with ledger.lease(ledger.claim(0.5), lease_seconds=0.5) as lease:
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE updates RENAME TO away"))
        until(lambda: lease.stop() == Stop.LOST)


def test_a_database_that_is_away_for_less_than_a_lease_does_no_harm(ledger: Ledger) -> None:
    with ledger.lease(ledger.claim()) as lease:
        before = ledger.lease_until()
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE updates RENAME TO away"))
        threading.Event().wait(0.2)  # several heartbeats fail
        with ledger.sessions.begin() as session:
            session.execute(text("ALTER TABLE away RENAME TO updates"))
        until(lambda: ledger.lease_until() > before)
        assert lease.stop() is None
