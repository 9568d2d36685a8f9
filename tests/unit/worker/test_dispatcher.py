"""Which updates a sweep sends, and when it sends one again."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy import text

from domain.settings import Settings
from registry import updates
from registry.claims import Claim
from tests.conftest_databases import NewDatabase
from tests.unit.registry.steps import Ledger, lines
from worker.dispatcher import RENUDGE_SECONDS, Dispatcher
from worker.housekeeping import Housekeeper


class Scene:
    """A ledger with one queued update per assistant, a broker of a list, and a clock of our own."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.sessions = ledger.sessions
        self.now = 1000.0
        self.waiting = 0
        self.broker_down = False
        self.sent: list[str] = []
        self.dispatcher = Dispatcher(
            ledger.reads,
            send=self._send,
            pending=lambda: self.waiting,
            clock=lambda: self.now,
        )

    def _send(self, update_id: str) -> None:
        if self.broker_down:
            raise OperationalError("no broker")
        self.sent.append(update_id)

    def queue(self, name: str) -> str:
        assistant = self.ledger.assistant(name)
        self.ledger.teach(assistant, self.ledger.skill(assistant), lines(0, 1))
        return self.ledger.queue(assistant).id

    def claim(self, update_id: str) -> Claim:
        claim = self.ledger.claim(update_id)
        assert claim is not None
        return claim


@pytest.fixture
def scene(new_sqlite: NewDatabase) -> Iterator[Scene]:
    ledger = Ledger(new_sqlite(True))
    yield Scene(ledger)
    ledger.engine.dispose()


def test_every_waiting_update_is_sent_once(scene: Scene) -> None:
    first, second = scene.queue("a"), scene.queue("b")
    assert scene.dispatcher.sweep() == [first, second]
    for _ in range(5):
        scene.now += RENUDGE_SECONDS / 6
        assert scene.dispatcher.sweep() == []
    assert scene.sent == [first, second]


def test_a_message_that_the_broker_lost_is_sent_again(scene: Scene) -> None:
    update = scene.queue("a")
    scene.dispatcher.sweep()
    scene.now += RENUDGE_SECONDS - 0.1
    assert scene.dispatcher.sweep() == []
    scene.now += 0.1
    assert scene.dispatcher.sweep() == [update]


def test_nothing_is_sent_again_while_messages_wait_for_a_busy_worker(scene: Scene) -> None:
    scene.queue("a")
    scene.dispatcher.sweep()
    scene.waiting = 1
    scene.now += 10 * RENUDGE_SECONDS
    assert scene.dispatcher.sweep() == []


def test_an_update_given_back_is_sent_at_once(scene: Scene) -> None:
    update = scene.queue("a")
    scene.dispatcher.sweep()
    claim = scene.claim(update)
    assert scene.dispatcher.sweep() == []
    with scene.sessions.begin() as session:
        updates.release(session, claim)
    assert scene.dispatcher.sweep() == [update]


def test_what_could_not_be_sent_is_sent_by_the_next_sweep(scene: Scene) -> None:
    update = scene.queue("a")
    scene.broker_down = True
    with pytest.raises(OperationalError):
        scene.dispatcher.sweep()
    scene.broker_down = False
    assert scene.dispatcher.sweep() == [update]


def test_an_update_that_waits_after_a_setback_is_sent_when_its_time_has_come(scene: Scene) -> None:
    update = scene.queue("a")
    scene.dispatcher.sweep()
    claim = scene.claim(update)
    error = {"code": "disk_full", "message": "full", "param": None}
    with scene.sessions.begin() as session:
        updates.retry_later(session, claim, error)
    assert scene.dispatcher.sweep() == []
    with scene.sessions.begin() as session:
        session.execute(text("UPDATE updates SET not_before = not_before - 31"))
    assert scene.dispatcher.sweep() == [update]


def test_a_sweep_waits_for_no_writer_and_holds_up_none(scene: Scene) -> None:
    update = scene.queue("a")
    with scene.sessions.begin() as writer:
        writer.execute(text("UPDATE teams SET name = 'changed'"))
        started_at = time.monotonic()
        assert scene.dispatcher.sweep() == [update]
        assert time.monotonic() - started_at < 25  # a writer would wait 30 s for the lock


def test_housekeeping_looks_without_the_write_lock(scene: Scene, tmp_path: Path) -> None:
    housekeeper = Housekeeper(Settings(home=tmp_path, keep_versions=1), scene.sessions, scene.ledger.reads)
    with scene.sessions.begin() as writer:
        writer.execute(text("UPDATE teams SET name = 'changed'"))
        started_at = time.monotonic()
        assert housekeeper.prunable() == []
        assert housekeeper.unneeded(["ver_nobody"]) == ["ver_nobody"]
        assert time.monotonic() - started_at < 25
