"""Who may run an update: the lease, the fence, first in first out."""

import time
from collections import defaultdict
from itertools import chain

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from domain.errors import Conflict, StaleFence
from domain.update import Phase, Status
from registry import aliases, events, updates, versions
from registry.claims import Claim, Patience
from registry.leases import DEFAULT_PATIENCE
from registry.session import db_now
from registry.tables import Assistant, Skill, Update, Version
from tests.unit.registry.steps import Ledger, lines, race

TIRELESS = Patience(tries=50, first_seconds=0)


def queue(ledger: Ledger, assistant: Assistant, skill: Skill, count: int, start: int = 0) -> list[Update]:
    made = []
    for n in range(start, start + count):
        ledger.teach(assistant, skill, lines(n, n + 1))
        made.append(ledger.queue(assistant))
    return made


def claimable(ledger: Ledger, patience: Patience = DEFAULT_PATIENCE) -> list[str]:
    with ledger.begin() as session:
        return updates.claimable(session, patience)


def test_only_the_oldest_of_each_assistant_is_to_be_had(ledger: Ledger) -> None:
    one, other = ledger.assistant("one"), ledger.assistant("other")
    a, b = queue(ledger, one, ledger.skill(one), 2)
    c, d = queue(ledger, other, ledger.skill(other), 2)
    assert claimable(ledger) == [a.id, c.id]
    assert ledger.claim(b.id) is None
    assert ledger.claim("upd_none") is None
    claim = ledger.must_claim(a)
    assert claimable(ledger) == [c.id]
    assert ledger.claim(b.id) is None
    ledger.finish(claim, Status.FAILED)
    assert claimable(ledger) == [b.id, c.id]
    assert ledger.claim(d.id) is None


def test_a_paused_update_does_not_hold_up_the_ones_behind_it(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    first, second = queue(ledger, assistant, ledger.skill(assistant), 2)
    with ledger.begin() as session:
        updates.request_pause(session, first, "user")
    assert claimable(ledger) == [second.id]
    with ledger.begin() as session:
        updates.resume(session, first, "user")
    assert claimable(ledger) == [first.id]


def test_the_lease_is_in_database_time_and_a_heartbeat_extends_it(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    (update,) = queue(ledger, assistant, ledger.skill(assistant), 1)
    with ledger.begin() as session:
        before = db_now(session)
    claim = ledger.must_claim(update, lease_seconds=40)
    with ledger.begin() as session:
        row = session.scalars(select(Update)).one()
        claimed = db_now(session)
        assert before <= row.started_at <= claimed
        assert before + 40 <= row.lease_until <= claimed + 40
        assert row.claimed_by == "w"
        updates.heartbeat(session, claim, 400)
        session.expire_all()
        assert claimed + 400 <= row.lease_until <= db_now(session) + 400
    assert claimable(ledger) == []


def test_a_lease_that_runs_out_is_taken_over_and_the_late_worker_changes_nothing(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    (update,) = queue(ledger, assistant, ledger.skill(assistant), 1)
    late = ledger.must_claim(update, lease_seconds=0.05)
    deadline = time.monotonic() + 60
    while claimable(ledger) != [update.id]:
        assert time.monotonic() < deadline
    current = ledger.must_claim(update)
    assert (late.fence, current.fence) == (1, 2)

    def writes(claim: Claim) -> None:
        with ledger.begin() as session:
            before = len(events.list_events(session, update, 0, 100))
        for write in (
            lambda s: updates.heartbeat(s, claim, 60),
            lambda s: updates.set_phase(s, claim, Phase.GATING),
            lambda s: updates.finish(s, claim, Status.FAILED),
            lambda s: updates.release(s, claim),
            lambda s: events.add_event(s, update.id, type="message", message="late", claim=claim),
            lambda s: versions.allocate_version(s, claim),
        ):
            with pytest.raises(StaleFence), ledger.begin() as session:
                write(session)
        with pytest.raises(StaleFence):
            ledger.publish(claim)
        with ledger.begin() as session:
            assert len(events.list_events(session, update, 0, 100)) == before
            assert session.scalars(select(Version.number)).all() == [0]
            assert aliases.get_alias(session, assistant, "champion").revision == 1
            assert session.scalars(select(Update.fence)).one() == 2

    writes(late)
    ledger.publish(current)
    assert ledger.finish(current).status == "succeeded"
    with pytest.raises(StaleFence):
        ledger.finish(current)


def test_a_late_worker_whose_fence_is_still_current_goes_on(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    (update,) = queue(ledger, assistant, ledger.skill(assistant), 1)
    claim = ledger.must_claim(update, lease_seconds=-5)
    assert claimable(ledger) == [update.id]
    with ledger.begin() as session:
        updates.heartbeat(session, claim, 60)
    assert claimable(ledger) == []
    assert ledger.publish(claim).number == 1


def test_a_released_update_keeps_its_place_and_its_parent(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.learn(assistant, skill, lines(100, 101))
    first, _ = queue(ledger, assistant, skill, 2)
    claim = ledger.must_claim(first)
    parent = ledger.read(first).parent_version_id
    assert parent == ledger.version(assistant, 1).id
    with ledger.begin() as session:
        released = updates.release(session, claim)
        assert (released.status, released.claimed_by, released.lease_until) == ("queued", None, None)
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    assert claimable(ledger) == [first.id]
    again = ledger.must_claim(first)
    assert again.fence == 2
    assert ledger.read(first).parent_version_id == parent


def test_the_database_itself_refuses_a_second_running_update(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    first, second = queue(ledger, assistant, ledger.skill(assistant), 2)
    ledger.must_claim(first)
    with pytest.raises(IntegrityError), ledger.begin() as session:
        session.execute(text("UPDATE updates SET status = 'running' WHERE id = :id"), {"id": second.id})


def test_finishing_needs_a_running_update_and_a_legal_state(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    (update,) = queue(ledger, assistant, ledger.skill(assistant), 1)
    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        ended = updates.finish(
            session, claim, Status.FAILED, error={"code": "x", "message": "no memory", "param": None}
        )
    assert (ended.status, ended.error, ended.lease_until) == (
        "failed",
        {"code": "x", "message": "no memory", "param": None},
        None,
    )
    assert ledger.claim(update.id) is None
    with pytest.raises(Conflict), ledger.begin() as session:
        updates.request_pause(session, update, "user")
    with ledger.begin() as session:
        assert events.list_events(session, update, 0, 100)[-1].message == "Failed: no memory"


def test_many_workers_claim_one_update_once(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    for n in range(5):
        (update,) = queue(ledger, assistant, skill, 1, start=n)
        lease_seconds = 60 if n % 2 else -1
        granted = race([lambda u=update: ledger.claim(u.id)] * 6)
        assert [type(one) for one in granted if one is not None] == [Claim]
        # A take-over races as well.
        claim = next(one for one in granted if one is not None)
        with ledger.begin() as session:
            updates.heartbeat(session, claim, lease_seconds)
        taken = [one for one in race([lambda u=update: ledger.claim(u.id)] * 6) if one is not None]
        assert [one.fence for one in taken] == ([] if n % 2 else [2])
        ledger.finish(taken[0] if taken else claim)


def test_workers_that_stall_and_die_lose_and_repeat_nothing(ledger: Ledger) -> None:
    """Invariants 2 and 3: 3 assistants, 5 updates each, 4 workers of which every third claim is dropped."""
    expected: dict[str, list[str]] = {}
    for name in ("a", "b", "c"):
        assistant = ledger.assistant(name)
        expected[assistant.id] = [u.id for u in queue(ledger, assistant, ledger.skill(assistant), 5)]
    published: list[str] = []
    stale: list[Claim] = []

    def work(n: int) -> None:
        deadline = time.monotonic() + 240
        turn = n
        while time.monotonic() < deadline:
            ids = claimable(ledger, TIRELESS)
            if not ids:
                with ledger.begin() as session:
                    if not session.scalars(select(Update.id).where(Update.finished_at.is_(None))).first():
                        return
                continue
            turn += 1
            dies = turn % 3 == 0
            chosen, lease = ids[turn % len(ids)], -1 if dies else 60
            claim = ledger.claim(chosen, lease_seconds=lease, worker=f"w{n}", patience=TIRELESS)
            if claim is None:
                continue
            if dies:
                stale.append(claim)
                continue
            ledger.publish(claim)
            ledger.finish(claim)
            published.append(claim.update_id)
        raise AssertionError("the queue was not worked off")

    assert race([lambda n=n: work(n) for n in range(4)]) == [None] * 4
    assert sorted(published) == sorted(chain.from_iterable(expected.values()))
    for claim in stale:
        with pytest.raises(StaleFence):
            ledger.publish(claim)
    order = defaultdict(list)
    with ledger.begin() as session:
        for version in session.scalars(select(Version).order_by(Version.number)):
            if version.number:
                order[version.assistant_id].append(version.update_id)
        parents = session.execute(select(Version.assistant_id, Version.number, Version.parent_id)).all()
    assert order == expected
    numbers = {(a, n): p for a, n, p in parents}
    assert sorted(n for _, n in numbers) == sorted(3 * list(range(6)))
    assert all((parent is None) == (number == 0) for (_, number), parent in numbers.items())
