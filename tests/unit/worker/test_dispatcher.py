"""Which updates a sweep sends, and when it sends one again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from sqlalchemy import Engine

from domain.demonstration import DemonstrationLine
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.skill import ExactGrader
from registry import assistants, demonstrations, updates
from registry.session import make_engine, make_sessions, upgrade
from worker.dispatcher import RENUDGE_SECONDS, Dispatcher


class Scene:
    """A ledger with one queued update per assistant, a broker of a list, and a clock of our own."""

    def __init__(self, url: str) -> None:
        self.engine: Engine = make_engine(url)
        self.sessions = make_sessions(self.engine)
        self.now = 1000.0
        self.waiting = 0
        self.broker_down = False
        self.sent: list[str] = []
        self.dispatcher = Dispatcher(
            self.sessions, send=self._send, pending=lambda: self.waiting, clock=lambda: self.now
        )

    def _send(self, update_id: str) -> None:
        if self.broker_down:
            raise OperationalError("no broker")
        self.sent.append(update_id)

    def queue(self, name: str) -> str:
        with self.sessions.begin() as session:
            assistant = assistants.create_assistant(
                session,
                team_id="team_default",
                name=name,
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
            return updates.create_update(
                session,
                assistant,
                skills=None,
                recipe=Recipe(),
                gate=GateRules(),
                publish="auto",
                actor="user",
            ).id

    def claim(self, update_id: str) -> updates.Claim:
        with self.sessions.begin() as session:
            claim = updates.claim(session, update_id, worker="w", lease_seconds=60)
        assert claim is not None
        return claim


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    url = f"sqlite:///{tmp_path / 'ratchet.db'}"
    upgrade(url)
    made = Scene(url)
    yield made
    made.engine.dispose()


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
