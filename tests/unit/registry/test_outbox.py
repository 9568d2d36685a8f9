"""The outbox of webhooks: written with what it tells, claimed once, tried again, given up, forgotten."""

import json

import pytest
from sqlalchemy import select, text

from domain import webhook as format
from domain.errors import Conflict, NotFound
from domain.webhook import EventType
from registry import assistants, idempotency, outbox, updates, webhooks
from registry.outbox import Attempt
from registry.tables import AuditRow, IdempotencyKey, Webhook, WebhookDelivery
from tests.unit.registry.steps import TEAM, Ledger, lines, race


def hook(ledger: Ledger, *event_types: EventType, url: str = "https://example.com/a") -> Webhook:
    with ledger.begin() as session:
        return webhooks.create_webhook(
            session, team_id=TEAM, url=url, description="", event_types=event_types, actor="user"
        )


def waiting(ledger: Ledger) -> list[WebhookDelivery]:
    with ledger.begin() as session:
        return list(session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.seq)))


def claim(ledger: Ledger, limit: int = 100, seconds: float = 60) -> list[Attempt]:
    with ledger.begin() as session:
        return outbox.claim_due(session, limit=limit, seconds=seconds)


def send_test(ledger: Ledger, webhook: Webhook) -> str:
    with ledger.begin() as session:
        return webhooks.send_test(session, webhook, "user").id


def due_now(ledger: Ledger) -> None:
    with ledger.begin() as session:
        session.execute(text("UPDATE webhook_deliveries SET next_attempt_at = 0 WHERE delivered_at IS NULL"))


def fail(ledger: Ledger, attempt: Attempt, status_code: int | None = 500) -> None:
    with ledger.begin() as session:
        outbox.failed(session, attempt, status_code=status_code, error="no")


def test_each_webhook_hears_of_what_it_subscribed_to(ledger: Ledger) -> None:
    everything, moves = hook(ledger), hook(ledger, "alias.moved", "update.succeeded")
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    version = ledger.learn(assistant, skill, lines(0, 2))
    ledger.teach(assistant, skill, lines(2, 4))
    queued = ledger.queue(assistant)
    with ledger.begin() as session:
        updates.request_cancel(session, queued, "user")
    heard = {
        webhook.id: [row.type for row in waiting(ledger) if row.webhook_id == webhook.id]
        for webhook in (everything, moves)
    }
    assert heard[everything.id] == [
        "alias.moved",  # champion is created with the assistant
        "update.created",
        "version.published",
        "alias.moved",
        "update.succeeded",
        "update.created",
        "update.cancelled",
    ]
    assert heard[moves.id] == ["alias.moved", "alias.moved", "update.succeeded"]
    published = next(row for row in waiting(ledger) if row.type == "version.published")
    body = json.loads(published.body)
    with ledger.begin() as session:
        [entry] = session.scalars(select(AuditRow).where(AuditRow.action == "version.publish"))
    assert (body["id"], body["object"], body["type"]) == (entry.id, "event", "version.published")
    assert body["created_at"] == int(entry.created_at)
    assert body["timestamp"].endswith("+00:00")
    assert body["data"]["id"] == version.id
    assert (body["data"]["number"], body["data"]["outcome"]) == (1, "pass")


def test_asking_a_running_update_to_cancel_is_no_event_yet(ledger: Ledger) -> None:
    hook(ledger, "update.cancelled")
    assistant = ledger.assistant()
    ledger.teach(assistant, ledger.skill(assistant), lines(0, 2))
    claimed = ledger.must_claim(ledger.queue(assistant))
    with ledger.begin() as session:
        updates.request_cancel(session, updates.get_update(session, TEAM, claimed.update_id), "user")
    assert waiting(ledger) == []
    ledger.finish(claimed)
    assert [row.type for row in waiting(ledger)] == ["update.cancelled"]


def test_nothing_is_told_of_what_did_not_happen(ledger: Ledger) -> None:
    hook(ledger)

    def create() -> None:
        with ledger.begin() as session:
            assistants.create_assistant(
                session,
                team_id=TEAM,
                name="lost",
                base_model="tiny",
                parameter_count=1,
                context_window=1,
                actor="user",
            )
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        create()
    assert waiting(ledger) == []


def test_a_delivery_is_claimed_by_one_sender(ledger: Ledger) -> None:
    webhook = hook(ledger)
    sent = {send_test(ledger, webhook) for _ in range(12)}
    found = race([lambda: claim(ledger, limit=5)] * 4)
    claimed = [attempt.id for attempts in found for attempt in attempts]
    assert len(claimed) == len(set(claimed))
    claimed += [attempt.id for attempt in claim(ledger)]
    assert sorted(claimed) == sorted(sent)


def test_what_nobody_settled_is_sent_again(ledger: Ledger) -> None:
    id = send_test(ledger, hook(ledger))
    [first] = claim(ledger, seconds=0)
    [second] = claim(ledger)
    assert (first.id, first.number, second.id, second.number) == (id, 1, id, 2)
    assert claim(ledger) == []
    # The first sender was only slow: its failure is stale, its success would count.
    fail(ledger, first)
    [row] = waiting(ledger)
    assert (row.error, row.attempts) == (None, 2)
    with ledger.begin() as session:
        outbox.delivered(session, first, 200)
    fail(ledger, second)
    [row] = waiting(ledger)
    assert row.delivered_at is not None
    assert (row.next_attempt_at, row.status_code, row.error) == (None, 200, None)


def test_failures_are_tried_again_after_growing_pauses_and_then_given_up(ledger: Ledger) -> None:
    send_test(ledger, hook(ledger))
    pauses = []
    for _ in range(len(format.RETRY_SECONDS)):
        due_now(ledger)
        [attempt] = claim(ledger)
        with ledger.begin() as session:
            now = session.execute(text("SELECT created_at FROM audit_logs ORDER BY seq DESC")).scalar()
            assert now is not None
        fail(ledger, attempt)
        [row] = waiting(ledger)
        assert row.next_attempt_at is not None
        pauses.append(row.next_attempt_at - row.created_at)
    for paused, expected in zip(pauses, format.RETRY_SECONDS, strict=True):
        assert expected <= paused < expected + 60
    due_now(ledger)
    [last] = claim(ledger)
    fail(ledger, last)
    [row] = waiting(ledger)
    assert (row.next_attempt_at, row.delivered_at, row.error) == (None, None, "no")
    assert row.attempts == len(format.RETRY_SECONDS) + 1


def test_a_receiver_that_is_gone_is_not_asked_again(ledger: Ledger) -> None:
    webhook = hook(ledger)
    send_test(ledger, webhook)
    [attempt] = claim(ledger)
    fail(ledger, attempt, status_code=410)
    [row] = waiting(ledger)
    assert row.next_attempt_at is None
    ledger.assistant()
    assert len(waiting(ledger)) == 1
    with ledger.begin() as session:
        assert webhooks.get_webhook(session, TEAM, webhook.id).disabled_because == "It answered 410 Gone."


def test_a_deleted_webhook_takes_what_waits_with_it(ledger: Ledger) -> None:
    webhook, other = hook(ledger), hook(ledger)
    send_test(ledger, webhook)
    kept = send_test(ledger, other)
    with ledger.begin() as session:
        webhooks.delete_webhook(session, webhook, "user")
    assert [row.id for row in waiting(ledger)] == [kept]
    with ledger.begin() as session, pytest.raises(NotFound):
        webhooks.get_webhook(session, TEAM, webhook.id)
    with ledger.begin() as session, pytest.raises(NotFound):
        webhooks.get_webhook(session, "team_other", other.id)


def test_a_team_has_a_bounded_number_of_webhooks(ledger: Ledger) -> None:
    for _ in range(webhooks.MOST_WEBHOOKS):
        hook(ledger)
    with pytest.raises(Conflict, match="at most"):
        hook(ledger)


def test_old_ended_deliveries_and_old_keys_are_forgotten(ledger: Ledger) -> None:
    webhook = hook(ledger)
    done, waits, young = (send_test(ledger, webhook) for _ in range(3))
    with ledger.begin() as session:
        session.execute(
            text(
                "UPDATE webhook_deliveries SET created_at = created_at - 1000, "
                f"next_attempt_at = CASE WHEN id = '{waits}' THEN next_attempt_at END WHERE id != '{young}'"
            )
        )
        assert outbox.purge(session, older_than_seconds=500) == 1
    assert [row.id for row in waiting(ledger)] == [waits, young]
    assert done not in (waits, young)
    for key in ("old", "new"):
        with ledger.begin() as session:
            idempotency.begin(session, TEAM, key, "h")
            idempotency.complete(session, TEAM, key, 201, "{}")
    with ledger.begin() as session:
        session.execute(text("UPDATE idempotency_keys SET created_at = created_at - 1000 WHERE key = 'old'"))
        assert idempotency.purge(session, older_than_seconds=500) == 1
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new"]
