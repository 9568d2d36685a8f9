"""Cancel, pause and resume in every phase, with the worker that should have heard them killed."""

from collections.abc import Iterator

import pytest

from domain.errors import Conflict
from registry import updates
from tests.faults.world import LONG, World, kill, running_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PHASES = {
    "claimed": "worker.claimed",
    "preflight": "worker.job_written",
    "training": "worker.step_heard",
    "evaluating": "worker.suite_measured",
    "gating": "worker.gating",
    "publishing": "worker.files_published",
}
VERBS = ["cancel", "pause", "pause and resume"]
WHEN = ["worker lives", "worker is lost"]
EVERY = [(phase, verb, when) for phase in PHASES for verb in VERBS for when in WHEN]
CHOSEN = EVERY if LONG else EVERY[::5]
"""Every fifth: each phase, each verb and both at least twice."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as made:
        yield made


@pytest.mark.parametrize(("phase", "verb", "when"), CHOSEN)
def test_what_was_acknowledged_happens(world: World, phase: str, verb: str, when: str) -> None:
    assistant = world.stack.assistant(world.name("a"))
    update_id = world.update(assistant)
    frozen = world.die_at(update_id, PHASES[phase], "stop")
    if when == "worker is lost":
        world.expire(update_id)
    asked = world.ask(updates.request_cancel if verb == "cancel" else updates.request_pause, update_id)
    if when == "worker is lost":
        assert asked.status == ("cancelled" if verb == "cancel" else "paused")
    if verb == "pause and resume":
        world.ask(updates.resume, update_id)
    kill(frozen)
    world.claim_until_ended(frozen)
    world.expire(update_id)
    row = world.finish(update_id)
    if verb == "cancel":
        assert (row.status, row.version_id, world.stack.champion(assistant)) == ("cancelled", None, 0)
    elif verb == "pause":
        assert (row.status, row.version_id, row.lease_until) == ("paused", None, None)
        world.ask(updates.resume, update_id)
        row = world.finish(update_id)
    if verb != "cancel":
        assert (row.status, world.stack.champion(assistant)) == ("succeeded", 1)
    assert world.violations() == []


def test_after_publication_cancel_is_refused_and_pause_changes_nothing_that_is_out(world: World) -> None:
    assistant = world.stack.assistant(world.name("a"))
    update_id = world.update(assistant)
    frozen = world.die_at(update_id, "worker.row_committed", "stop")
    with pytest.raises(Conflict, match="published"):
        world.ask(updates.request_cancel, update_id)
    world.ask(updates.request_pause, update_id)
    kill(frozen)
    world.claim_until_ended(frozen)
    world.expire(update_id)
    row = world.finish(update_id)
    if row.status == "paused":
        world.ask(updates.resume, update_id)
        row = world.finish(update_id)
    assert (row.status, world.stack.champion(assistant)) == ("succeeded", 1)
    assert world.violations() == []
