"""Workers killed and frozen at random while they work off many updates; then the history is read.

On PostgreSQL the server crashes and recovers in between as well. Workers draw what they claim at random
from all that is to be had, which is what messages amount to that come late, twice or not at all.
"""

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from domain.errors import Conflict
from domain.update import FINISHED
from registry import updates
from registry.tables import Event, Update
from tests.conftest_databases import NewDatabase
from tests.faults.postgres import crash, server_of
from tests.faults.world import LONG, World, alive, kill, running_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

UPDATES = int(os.environ.get("FAULTS_UPDATES", "1000" if LONG else "6"))
ASSISTANTS = 40 if LONG else 2
WORKERS = 4
LEASE_SECONDS = 3.0
SEED = int(os.environ.get("FAULTS_SEED", "1"))
Result = TypeVar("Result")
DATABASES = ["sqlite", "postgresql"] if LONG else ["sqlite"]


def patiently(read: Callable[[Session], Result], world: World) -> Result:
    """What is read, once the database is there again."""
    for _ in range(100):
        with contextlib.suppress(SQLAlchemyError), world.stack.sessions.begin() as session:
            return read(session)
        time.sleep(0.1)
    raise AssertionError("the database did not come back")


class Storm:
    """Kills, frosts and requests, drawn by `seed`, until every update has ended."""

    def __init__(self, world: World, seed: int, server: psutil.Process | None) -> None:
        self.world = world
        self.draw = random.Random(seed)
        self.server = server
        self.counts: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.workers = [self._worker() for _ in range(WORKERS)]
        self.thawed: list[psutil.Process] = []

    def _worker(self) -> psutil.Process:
        return self.world.fork("work", seed=self.draw.random())

    def rage(self, ids: list[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := self._unfinished():
            assert time.monotonic() < deadline, f"{len(left)} left: {self.world.log()}"
            self._await_progress(self.draw.randint(3, 27))
            while len(self.thawed) > WORKERS:
                kill(self.thawed.pop(0))
            with contextlib.suppress(psutil.NoSuchProcess):  # one that ended under our eyes
                self._strike()
            self._ask(self.draw.choice(ids))

    def _await_progress(self, events: int) -> None:
        """Strikes come by what the workers get done, about thirty events an update, and not by the clock:
        a slow machine meets no harder storm. When all are frozen or the database is away, they come too."""
        before, deadline = self._last_event(), time.monotonic() + 2 * LEASE_SECONDS
        while self._last_event() < before + events and time.monotonic() < deadline:
            time.sleep(0.05)

    def _last_event(self) -> int:
        return patiently(lambda session: session.scalar(select(func.max(Event.id))) or 0, self.world)

    def _strike(self) -> None:
        n = self.draw.randrange(WORKERS)
        what = self.draw.choices(["kill", "freeze", "kill a trainer", "crash the database"], [4, 2, 2, 1])[0]
        if what == "crash the database":
            if self.server is None:
                return
            crash(self.server, self.draw)
        elif what == "kill a trainer":
            trainers = [
                child for child in self.workers[n].children() if "worker_stack" in " ".join(child.cmdline())
            ]
            if not trainers:
                return
            kill(trainers[0])
        else:
            victim, self.workers[n] = self.workers[n], self._worker()
            if what == "kill":
                kill(victim)
            else:
                victim.suspend()
                # By the clock alone: it may hold SQLite's write lock, and then nobody else gets on.
                seconds = self.draw.uniform(0.5, 2) * LEASE_SECONDS
                timer = threading.Timer(seconds, self._thaw, [victim])
                timer.daemon = True
                timer.start()
        self.counts[what] += 1

    def _thaw(self, victim: psutil.Process) -> None:
        """It finds its update taken over, goes on as one worker more, and is killed some time after."""
        if alive(victim):
            victim.resume()
            self.counts["thaw"] += 1
            self.thawed.append(victim)

    def _ask(self, update_id: str) -> None:
        """Now and then somebody cancels, or pauses and resumes."""
        verb = self.draw.choices(["", "cancel", "pause"], [12, 1, 2])[0]
        # It had ended, or the database was away: then nothing was acknowledged.
        with contextlib.suppress(Conflict, SQLAlchemyError):
            if verb == "cancel":
                self.world.ask(updates.request_cancel, update_id)
                self.cancelled.add(update_id)
            elif verb == "pause":
                self.world.ask(updates.request_pause, update_id)
                self.world.ask(updates.resume, update_id)
            if verb:
                self.counts[verb] += 1

    def _unfinished(self) -> list[str]:
        unfinished = select(Update.id, Update.status).where(Update.status.not_in(FINISHED))
        rows = patiently(lambda session: session.execute(unfinished).all(), self.world)
        for update_id, status in rows:
            if status == "paused":  # its resume was not acknowledged
                self._resume(update_id)
        return [update_id for update_id, _ in rows]

    def _resume(self, update_id: str) -> None:
        with contextlib.suppress(Conflict, SQLAlchemyError):
            self.world.ask(updates.resume, update_id)


@pytest.fixture(params=DATABASES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    with running_world(new(True), lease_seconds=LEASE_SECONDS) as made:
        yield made


def test_updates_survive_a_storm(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stack = world.stack
    lines = [stack.assistant(world.name("a")) for _ in range(ASSISTANTS)]
    ids = [world.update(lines[n % ASSISTANTS]) for n in range(UPDATES)]
    storm = Storm(world, SEED, server_of(world.stack.db))
    began = time.monotonic()
    storm.rage(ids, seconds=120 + 8 * UPDATES)
    seconds = time.monotonic() - began
    ended = Counter(stack.update(update_id).status for update_id in ids)
    claims = sum(stack.update(update_id).fence for update_id in ids)
    with capsys.disabled():
        told = f"{UPDATES} updates in {seconds:.0f} s, {claims} claims, {dict(storm.counts)}, {dict(ended)}"
        print(f"\n{stack.db.dialect.name}: {told}")
    assert world.violations() == []
    assert {stack.update(update_id).status for update_id in storm.cancelled} <= {"cancelled"}
    assert ended["failed"] == 0
    assert sum(storm.counts[what] for what in ("kill", "freeze", "kill a trainer")) >= UPDATES // 4
