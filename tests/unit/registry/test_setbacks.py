"""An update that gets no further: counted, tried again later and later, ended with its reason."""

import pytest
from sqlalchemy import text

from domain.errors import StaleFence
from domain.update import Phase
from registry import events, updates
from registry.claims import Claim, Patience
from registry.session import db_now
from registry.tables import Update
from tests.unit.registry.steps import TEAM, Ledger, lines

PATIENCE = Patience(tries=3, first_seconds=4000, most_seconds=6000)
SOON = 100.0
"""Seconds: little beside these waits, and more than a busy machine takes between two steps of a test."""
FULL = {"code": "disk_full", "message": "No space left.", "param": None}


def queued(ledger: Ledger, name: str = "helper") -> Update:
    assistant = ledger.assistant(name)
    ledger.teach(assistant, ledger.skill(assistant), lines(0, 1))
    return ledger.queue(assistant)


def claim(ledger: Ledger, update: Update) -> Claim | None:
    with ledger.begin() as session:
        return updates.claim(session, update.id, worker="w", lease_seconds=60, patience=PATIENCE)


def claimable(ledger: Ledger) -> list[str]:
    with ledger.begin() as session:
        return updates.claimable(session, PATIENCE)


def lose(ledger: Ledger, seconds_ago: float) -> None:
    """The lease of whatever runs ran out that long ago."""
    with ledger.begin() as session:
        until = db_now(session) - seconds_ago
        session.execute(text("UPDATE updates SET lease_until = :t WHERE status = 'running'"), {"t": until})


def pass_time(ledger: Ledger, seconds: float) -> None:
    with ledger.begin() as session:
        session.execute(text("UPDATE updates SET not_before = not_before - :s"), {"s": seconds})


def test_waits_double_up_to_the_most() -> None:
    patience = Patience(tries=9, first_seconds=30, most_seconds=200)
    assert [patience.seconds(n) for n in range(6)] == [0, 30, 60, 120, 200, 200]


def test_an_update_that_kills_every_worker_ends_after_so_many(ledger: Ledger) -> None:
    update = queued(ledger)
    assert claim(ledger, update) is not None
    lose(ledger, 1)
    second = claim(ledger, update)  # the first take-over follows the lease at once
    assert second is not None
    assert ledger.read(update).setbacks == 1
    lose(ledger, 4000 - SOON)
    assert claimable(ledger) == []
    assert claim(ledger, update) is None
    lose(ledger, 4001)
    assert claimable(ledger) == [update.id]
    with ledger.begin() as session:
        updates.set_phase(session, second, Phase.TRAINING)
    assert claim(ledger, update) is not None
    assert ledger.read(update).setbacks == 2
    lose(ledger, 6001)
    assert claim(ledger, update) is None
    ended = ledger.read(update)
    assert (ended.status, ended.setbacks, ended.fence, ended.lease_until) == ("failed", 3, 4, None)
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"
    assert ended.error["message"].startswith("3 workers in a row were lost while they ran this update")
    assert "phase: training" in ended.error["message"]
    assert claimable(ledger) == []


def test_progress_forgives_setbacks(ledger: Ledger) -> None:
    update = queued(ledger)
    for _ in range(6):
        granted = claim(ledger, update)
        assert granted is not None
        with ledger.begin() as session:
            updates.note_progress(session, granted)
        lose(ledger, 1)
    assert ledger.read(update).setbacks == 0
    current = claim(ledger, update)
    assert current is not None
    with pytest.raises(StaleFence), ledger.begin() as session:
        updates.note_progress(session, Claim(update.id, current.fence - 1, TEAM, current.assistant_id))


def test_one_that_has_published_succeeds_whatever_became_of_its_workers(ledger: Ledger) -> None:
    update = queued(ledger)
    granted = claim(ledger, update)
    assert granted is not None
    version = ledger.publish(granted)
    for _ in range(3):
        lose(ledger, 6001)
        claim(ledger, update)
    ended = ledger.read(update)
    assert (ended.status, ended.version_id, ended.error) == ("succeeded", version.id, None)


def test_a_failure_that_may_pass_is_tried_again_later(ledger: Ledger) -> None:
    update = queued(ledger)
    for tried, wait in ((1, 4000), (2, 6000)):
        granted = claim(ledger, update)
        assert granted is not None
        with ledger.begin() as session:
            row = updates.retry_later(session, granted, FULL, PATIENCE)
            assert (row.status, row.setbacks, row.lease_until) == ("queued", tried, None)
            assert row.not_before == pytest.approx(db_now(session) + wait, abs=SOON)
        with pytest.raises(StaleFence):
            ledger.publish(granted)
        pass_time(ledger, wait - SOON)
        assert claim(ledger, update) is None
        pass_time(ledger, SOON)
        assert claimable(ledger) == [update.id]
    granted = claim(ledger, update)
    assert granted is not None
    with ledger.begin() as session:
        updates.retry_later(session, granted, FULL, PATIENCE)
    ended = ledger.read(update)
    assert ended.status == "failed"
    assert ended.error == {"code": "disk_full", "message": "No space left. (Tried 3 times.)", "param": None}
    with ledger.begin() as session:
        told = [e.message for e in events.list_events(session, update, 0, 99) if e.level == "warning"]
    assert told == [
        "Trying again in 4000 s (1 of 3 tries): No space left.",
        "Trying again in 6000 s (2 of 3 tries): No space left.",
    ]


def test_an_update_that_waits_for_its_next_try_keeps_its_place(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 1))
    first = ledger.queue(assistant)
    ledger.teach(assistant, skill, lines(1, 2))
    second = ledger.queue(assistant)
    granted = claim(ledger, first)
    assert granted is not None
    with ledger.begin() as session:
        updates.retry_later(session, granted, FULL, PATIENCE)
    assert claimable(ledger) == []
    assert claim(ledger, second) is None
    other = queued(ledger, "other")  # other assistants do not wait with it
    assert claimable(ledger) == [other.id]


@pytest.mark.parametrize(("asked", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_what_people_asked_for_comes_before_another_try(ledger: Ledger, asked: str, status: str) -> None:
    update = queued(ledger)
    granted = claim(ledger, update)
    assert granted is not None
    with ledger.begin() as session:
        (updates.request_cancel if asked == "cancel" else updates.request_pause)(session, update, "user")
        updates.retry_later(session, granted, FULL, PATIENCE)
    ended = ledger.read(update)
    assert (ended.status, ended.not_before) == (status, None)


def test_resume_forgives_setbacks_and_waits_no_longer(ledger: Ledger) -> None:
    update = queued(ledger)
    granted = claim(ledger, update)
    assert granted is not None
    with ledger.begin() as session:
        updates.retry_later(session, granted, FULL, PATIENCE)
        updates.request_pause(session, update, "user")
        updates.resume(session, update, "user")
    assert ledger.read(update).setbacks == 0
    assert claim(ledger, update) is not None
