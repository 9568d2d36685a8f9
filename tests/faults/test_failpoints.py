"""Death and frost at every step of an update's story, each taken up again by the next claim."""

from collections.abc import Iterator

import pytest

from registry import updates
from tests.conftest_databases import NewDatabase
from tests.faults.world import LONG, World, kill, running_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OUTSIDE = [
    "worker.claimed",
    "worker.job_written",
    "worker.step_heard",
    "worker.trained",
    "worker.candidate_placed",
    "worker.suite_measured",
    "worker.gating",
    "worker.allocated",
    "worker.staged",
    "worker.files_published",
    "worker.row_committed",
    "worker.finished",
]
INSIDE = ["worker.row_written", "worker.finishing"]
"""Within a transaction: a frozen process would hold SQLite's only write lock until it thaws."""
TRAINER = ["trainer.started", "trainer.step", "trainer.checkpointed", "trainer.adapter_written"]
FROZEN = OUTSIDE[:-1] if LONG else ["worker.step_heard", "worker.files_published"]
KILLED = [*OUTSIDE, *INSIDE, *TRAINER]
TRAINED_BY = KILLED.index("worker.candidate_placed")
DATABASES = ["sqlite", "postgresql"] if LONG else ["sqlite"]


@pytest.fixture(scope="module", params=DATABASES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    with running_world(new(True)) as made:
        yield made


def assert_published_once(world: World, assistant: str, update_id: str) -> None:
    row = world.finish(update_id)
    assert (row.status, row.error) == ("succeeded", None), world.log()
    assert world.stack.champion(assistant) == 1
    assert not (world.stack.home / "work" / update_id).exists()
    assert world.violations() == []


@pytest.mark.parametrize("point", KILLED)
def test_killed(world: World, point: str) -> None:
    assistant = world.stack.assistant(world.name("a"))
    update_id = world.update(assistant)
    trainers = len(world.stack.trainers())
    claimed = world.die_at(update_id, point)
    if point in TRAINER:  # its worker gives the update back, to be tried again
        world.claim_until_ended(claimed)
    world.expire(update_id)
    assert_published_once(world, assistant, update_id)
    started = len(world.stack.trainers()) - trainers
    again = point in TRAINER or 1 < KILLED.index(point) < TRAINED_BY
    assert started == (2 if again else 1)


@pytest.mark.parametrize("point", FROZEN)
def test_frozen_past_its_lease_and_thawed(world: World, point: str) -> None:
    assistant = world.stack.assistant(world.name("a"))
    update_id = world.update(assistant)
    frozen = world.die_at(update_id, point, "stop")
    world.expire(update_id)
    assert_published_once(world, assistant, update_id)
    before = world.stack.update(update_id)
    frozen.resume()
    world.claim_until_ended(frozen)
    after = world.stack.update(update_id)
    assert (after.version_id, after.fence, after.finished_at) == (
        before.version_id,
        before.fence,
        before.finished_at,
    )
    assert world.violations() == []


@pytest.mark.parametrize("point", ["worker.releasing", "worker.released"])
def test_killed_while_giving_the_update_back(world: World, point: str) -> None:
    assistant = world.stack.assistant(world.name("a"))
    update_id = world.update(assistant)
    frozen = world.die_at(update_id, "worker.step_heard", "stop")
    world.ask(updates.request_pause, update_id)
    kill(frozen)
    world.claim_until_ended(frozen)
    world.expire(update_id)
    world.die_at(update_id, point)
    world.expire(update_id)
    assert world.finish(update_id).status == "paused"
    world.ask(updates.resume, update_id)
    assert_published_once(world, assistant, update_id)
