import pytest

from domain.errors import Conflict, InvalidInput, NotFound, NothingToTeach, StaleFence
from domain.update import Phase, Status
from registry import audit, events, updates
from registry.tables import Assistant, Skill
from tests.unit.registry.steps import PASS, TEAM, Ledger, lines, race, untaught


def taught(ledger: Ledger) -> tuple[Assistant, Skill]:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 3))
    return assistant, skill


def messages(ledger: Ledger, update) -> list[str]:  # type: ignore[no-untyped-def]
    with ledger.begin() as session:
        return [event.message for event in events.list_events(session, update, 0, 100)]


def test_an_update_takes_all_untaught_demonstrations_of_all_skills(ledger: Ledger) -> None:
    assistant, skill = taught(ledger)
    second = ledger.skill(assistant, "call")
    ledger.skill(assistant, "idle")
    ledger.teach(assistant, second, lines(7, 8))
    update = ledger.queue(assistant)
    assert (update.status, update.phase, update.skills) == ("queued", None, ["route", "call"])
    assert (update.fence, update.parent_version_id, update.recipe["method"]) == (0, None, "sdft")
    with ledger.begin() as session:
        rows = updates.demonstrations_of(session, update)
        assert [row.skill_id for row in rows] == 3 * [skill.id] + [second.id]
        assert [row.body["messages"][0]["content"] for row in rows] == [
            "prompt 0",
            "prompt 1",
            "prompt 2",
            "prompt 7",
        ]
        logged = audit.list_audit(session, TEAM, None, 100).rows[-1]
        assert (logged.action, logged.object_id, logged.data["demonstrations"]) == (
            "update.create",
            update.id,
            4,
        )


def test_named_skills_only(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    ledger.teach(assistant, ledger.skill(assistant, "call"), lines(7, 8))
    assert ledger.queue(assistant, ["call", "call"]).skills == ["call"]
    assert ledger.queue(assistant).skills == ["route"]


def test_unknown_idle_and_no_skills_are_refused_and_store_nothing(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    ledger.skill(assistant, "idle")
    for names, error in (
        (["nope"], NotFound),
        (["route", "nope"], NotFound),
        (["route", "idle"], NothingToTeach),
        ([], InvalidInput),
    ):
        with pytest.raises(error) as caught:
            ledger.queue(assistant, names)
        assert caught.value.param == "skills"
    with ledger.begin() as session:
        assert updates.list_updates(session, assistant, None, 10).rows == []
        assert len(untaught(session, assistant)) == 3


def test_nothing_new_to_teach(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    ledger.queue(assistant)
    with pytest.raises(NothingToTeach):
        ledger.queue(assistant)
    with pytest.raises(NothingToTeach):
        ledger.queue(ledger.assistant("empty"))


def test_updates_created_at_once_never_share_demonstrations(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    results = race([lambda: ledger.queue(assistant)] * 5)
    assert sum(isinstance(result, NothingToTeach) for result in results) == 4


def test_cancel_before_the_start_is_final(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)
    with ledger.begin() as session:
        cancelled = updates.request_cancel(session, update, "user")
        assert cancelled.status == "cancelled"
        assert cancelled.finished_at is not None
    assert ledger.claim(update.id) is None
    with pytest.raises(Conflict), ledger.begin() as session:
        updates.request_cancel(session, update, "user")
    with pytest.raises(Conflict), ledger.begin() as session:
        updates.resume(session, update, "user")


def test_cancel_of_a_running_update_reaches_its_worker_and_forbids_publishing(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)
    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        assert updates.request_cancel(session, update, "user").status == "running"
        updates.request_cancel(session, update, "user")
    with ledger.begin() as session:
        assert updates.heartbeat(session, claim, 60) == updates.Signals(cancel=True, pause=False)
    with pytest.raises(Conflict) as caught:
        ledger.publish(claim)
    assert caught.value.code == "update_cancelled"
    with ledger.begin() as session:
        assert updates.finish(session, claim, Status.SUCCEEDED, verdict=PASS).status == "cancelled"
    ended = ledger.read(update)
    assert (ended.status, ended.version_id) == ("cancelled", None)
    assert messages(ledger, update).count("Cancel requested.") == 1


def test_cancel_outlives_the_worker_that_heard_it(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)
    dead = ledger.must_claim(update)
    with ledger.begin() as session:
        updates.request_cancel(session, update, "user")
        updates.heartbeat(session, dead, -1)
    successor = ledger.must_claim(update)
    assert (dead.fence, successor.fence) == (1, 2)
    with ledger.begin() as session:
        assert updates.heartbeat(session, successor, 60).cancel
    with pytest.raises(Conflict):
        ledger.publish(successor)
    with ledger.begin() as session:
        assert updates.release(session, successor).status == "cancelled"


def test_cancel_and_pause_do_not_wait_for_a_worker_that_is_gone(ledger: Ledger) -> None:
    assistant, skill = taught(ledger)
    update = ledger.queue(assistant)
    dead = ledger.must_claim(update)
    with ledger.begin() as session:
        updates.request_pause(session, update, "user")
        updates.heartbeat(session, dead, -1)
        paused = updates.request_pause(session, update, "user")
        assert (paused.status, paused.lease_until, paused.claimed_by) == ("paused", None, None)
    with pytest.raises(StaleFence):
        ledger.publish(dead)
    with ledger.begin() as session:
        updates.resume(session, update, "user")
    again = ledger.must_claim(update)
    with ledger.begin() as session:
        assert updates.heartbeat(session, again, -1) == updates.Signals(cancel=False, pause=False)
        assert updates.request_cancel(session, update, "user").status == "cancelled"
    with pytest.raises(StaleFence):
        ledger.publish(again)
    ended = ledger.read(update)
    assert (ended.status, ended.version_id, ended.lease_until) == ("cancelled", None, None)
    ledger.teach(assistant, skill, lines(50, 51))
    ledger.must_claim(ledger.queue(assistant))  # it does not hold up the line


def test_cancel_and_publish_at_once_never_both_win(ledger: Ledger) -> None:
    assistant, skill = taught(ledger)

    def cancel(update) -> None:  # type: ignore[no-untyped-def]
        with ledger.begin() as session:
            updates.request_cancel(session, update, "user")

    for n in range(10, 18):
        ledger.teach(assistant, skill, lines(n, n + 1))
        update = ledger.queue(assistant)
        claim = ledger.must_claim(update)
        cancelled, published = race(
            [lambda update=update: cancel(update), lambda claim=claim: ledger.publish(claim)]
        )
        won = (cancelled is None, not isinstance(published, Conflict))
        assert won in ((True, False), (False, True)), (cancelled, published)
        ended = ledger.finish(claim)
        assert ended.status == ("cancelled" if won[0] else "succeeded")
        assert (ended.version_id is None) == won[0]


def test_a_published_update_cannot_be_cancelled(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)
    claim = ledger.must_claim(update)
    ledger.publish(claim)
    with pytest.raises(Conflict) as caught, ledger.begin() as session:
        updates.request_cancel(session, update, "user")
    assert caught.value.code == "already_published"


def test_pause_and_resume(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)
    with ledger.begin() as session:
        assert updates.request_pause(session, update, "user").status == "paused"
    assert ledger.claim(update.id) is None
    with pytest.raises(Conflict), ledger.begin() as session:
        updates.request_pause(session, update, "user")
    with ledger.begin() as session:
        assert updates.resume(session, update, "user").status == "queued"

    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        assert updates.request_pause(session, update, "user").status == "running"
    with ledger.begin() as session:
        assert updates.heartbeat(session, claim, 60) == updates.Signals(cancel=False, pause=True)
        assert updates.resume(session, update, "user").status == "running"
    with ledger.begin() as session:
        assert not updates.heartbeat(session, claim, 60).pause
        updates.request_pause(session, update, "user")
        assert updates.release(session, claim).status == "paused"
    with pytest.raises(StaleFence), ledger.begin() as session:
        updates.heartbeat(session, claim, 60)
    with ledger.begin() as session:
        resumed = updates.resume(session, update, "user")
        assert (resumed.status, resumed.pause_requested) == ("queued", False)


def test_events_are_numbered_within_their_update(ledger: Ledger) -> None:
    assistant, skill = taught(ledger)
    update = ledger.queue(assistant)
    ledger.teach(assistant, skill, lines(5, 6))
    other = ledger.queue(assistant)
    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        updates.set_phase(session, claim, Phase.TRAINING)
        events.add_event(
            session, update.id, type="metrics", message="step 1", data={"loss": 0.5}, claim=claim
        )
        events.add_event(session, other.id, type="message", message="hello", level="warning", claim=None)
    with ledger.begin() as session:
        found = [(e.seq, e.type, e.message) for e in events.list_events(session, update, 1, 100)]
        assert found == [(2, "message", "Started."), (3, "phase", "training"), (4, "metrics", "step 1")]
        assert [e.data for e in events.list_events(session, update, 3, 1)] == [{"loss": 0.5}]
        assert [e.seq for e in events.list_events(session, update, 0, 2)] == [1, 2]
        assert [(e.seq, e.level) for e in events.list_events(session, other, 0, 9)] == [
            (1, "info"),
            (2, "warning"),
        ]
    assert ledger.read(update).phase == "training"


def test_events_added_at_once_are_numbered_without_gaps(ledger: Ledger) -> None:
    assistant, _ = taught(ledger)
    update = ledger.queue(assistant)

    def add(n: int) -> None:
        for m in range(5):
            with ledger.begin() as session:
                events.add_event(session, update.id, type="message", message=f"{n}.{m}", claim=None)

    assert race([lambda n=n: add(n) for n in range(6)]) == [None] * 6
    with ledger.begin() as session:
        found = events.list_events(session, update, 0, 100)
        assert [event.seq for event in found] == list(range(1, 32))
        assert {event.message for event in found[1:]} == {f"{n}.{m}" for n in range(6) for m in range(5)}


def test_updates_are_listed_in_order_of_creation(ledger: Ledger) -> None:
    assistant, skill = taught(ledger)
    made = [ledger.queue(assistant).id]
    for n in range(10, 13):
        ledger.teach(assistant, skill, lines(n, n + 1))
        made.append(ledger.queue(assistant).id)
    with ledger.begin() as session:
        page = updates.list_updates(session, assistant, made[0], 2)
        assert ([row.id for row in page.rows], page.has_more) == (made[1:3], True)
