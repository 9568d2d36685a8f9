"""An evaluation's engine of its own: asked for, waited for, given back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from domain.errors import EngineUnavailable
from domain.settings import Settings
from registry import engines, serving
from registry.claims import Claim
from registry.session import upgrade
from registry.tables import Event, Update
from tests.unit.registry.steps import Ledger, lines
from worker import whole_engine
from worker.brief import read_brief
from worker.evaluation_engines import Engines
from worker.journal import Journal
from worker.lease import Interrupted, Stop
from worker.whole_engine import engine_for


class Held:
    """A lease that lasts until the test says otherwise."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def check(self) -> None:
        if self.stop is not None:
            raise Interrupted(self.stop)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(whole_engine, "POLL_SECONDS", 0.01)
    url = f"sqlite:///{tmp_path / 'ratchet.db'}"
    upgrade(url)
    made = Ledger(url)
    yield made
    made.engine.dispose()


@pytest.fixture
def update(ledger: Ledger) -> Update:
    assistant = ledger.assistant()
    ledger.teach(assistant, ledger.skill(assistant), lines(0, 2))
    return ledger.queue(assistant)


def asked_for(ledger: Ledger) -> list[tuple[str, str | None]]:
    with ledger.begin() as session:
        return [(model.id, model.folder) for model in engines.wanted_models(session)]


def needed(ledger: Ledger, claim: Claim, lease: Held) -> Any:
    journal = Journal(ledger.sessions, claim, lambda: None)
    return engine_for(
        ledger.sessions,
        ledger.reads,
        claim,
        claim.update_id,
        Path("/candidate"),
        lease=lease,
        journal=journal,
    )


def register(ledger: Ledger, update_id: str) -> None:
    with ledger.begin() as session:
        serving.register_replica(session, "http://127.0.0.1:1", update_id, "cand")


def test_it_is_asked_for_until_the_block_ends(ledger: Ledger, update: Update) -> None:
    claim = ledger.must_claim(update)
    order: list[str] = []

    def supervise() -> None:
        while not asked_for(ledger):
            pass
        order.append("started")
        register(ledger, update.id)

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    with needed(ledger, claim, Held()):
        order.append("entered")
        assert asked_for(ledger) == [(update.id, "/candidate")]
    supervisor.join()
    assert order == ["started", "entered"]
    assert asked_for(ledger) == []


def test_why_it_does_not_start_is_told_once_and_waiting_gives_way_to_a_stop(
    ledger: Ledger, update: Update
) -> None:
    claim, lease = ledger.must_claim(update), Held()

    def supervise() -> None:
        while not asked_for(ledger):
            pass
        with ledger.begin() as session:
            engines.report(session, update.id, "no room")
        while not told():
            pass
        lease.stop = Stop.PAUSE

    def told() -> list[str]:
        with ledger.begin() as session:
            return [row.message for row in session.query(Event).where(Event.level == "warning")]

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    with pytest.raises(Interrupted), needed(ledger, claim, lease):
        pytest.fail("there is no engine")
    supervisor.join()
    assert told() == ["Waiting for an inference engine: no room"]
    assert asked_for(ledger) == []


def test_a_successor_s_demand_is_left_alone(ledger: Ledger, update: Update) -> None:
    claim = ledger.must_claim(update, lease_seconds=-1)
    register(ledger, update.id)
    with needed(ledger, claim, Held()):
        successor = ledger.must_claim(update)
        with ledger.begin() as session:
            engines.demand_for_update(session, successor, update.id, "/candidate")
    assert asked_for(ledger) == [(update.id, "/candidate")]


def test_it_is_not_waited_for_where_nobody_starts_engines(
    ledger: Ledger, update: Update, tmp_path: Path
) -> None:
    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        brief = read_brief(session, claim)
    settings = Settings(home=tmp_path, engine_url="http://engine:8000")
    lease: Any = Held()
    journal = Journal(ledger.sessions, claim, lambda: None)
    evaluation = Engines(ledger.sessions, ledger.reads, claim, brief, lease, journal, settings)
    with (
        pytest.raises(EngineUnavailable, match="not Ratchet's to start") as refused,
        evaluation.of_candidate(tmp_path),
    ):
        pytest.fail("there is no engine")
    assert refused.value.code == "engine_refused"  # which is not tried again
    assert asked_for(ledger) == []
