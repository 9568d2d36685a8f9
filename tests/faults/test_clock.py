"""Leases are in database time: a worker may be hours off, and a lost one is replaced soon."""

import time

import pytest

from tests.conftest_databases import NewDatabase
from tests.faults.world import kill, running_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LEASE_SECONDS = 4.0
HOUR = 3600.0


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_a_worker_an_hour_off_expires_nothing_early(new_postgresql: NewDatabase, ahead: float) -> None:
    """On PostgreSQL, whose clock is none of the workers'; SQLite's is that of the one machine."""
    with running_world(new_postgresql(True)) as world:
        world.stack.plan(steps=60, step_seconds=0.1, checkpoint_every=10)
        update_id = world.update(world.stack.assistant())
        first = world.fork("claim", update=update_id, clock=ahead)
        world.stack.until(lambda: len(world.stack.steps(update_id)) >= 2, "two steps")
        world.fork("work", seed=1, clock=-ahead)
        world.fork("work", seed=2, clock=ahead)
        row = world.finish(update_id)
        world.claim_until_ended(first)
        assert (row.status, row.fence) == ("succeeded", 1)
        assert world.violations() == []


def test_a_lost_worker_is_replaced_within_its_lease_and_ten_seconds(new_postgresql: NewDatabase) -> None:
    with running_world(new_postgresql(True), lease_seconds=LEASE_SECONDS) as world:
        world.stack.plan(steps=300, step_seconds=0.1, checkpoint_every=10)
        update_id = world.update(world.stack.assistant())
        victim = world.fork("work", seed=1, clock=HOUR)
        world.stack.until(lambda: len(world.stack.steps(update_id)) >= 2, "two steps")
        world.fork("work", seed=2, clock=-HOUR)
        kill(victim)
        lost = time.monotonic()
        world.stack.until(lambda: world.stack.update(update_id).fence == 2, "the take-over", 60)
        assert time.monotonic() - lost <= LEASE_SECONDS + 10
