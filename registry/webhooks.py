"""Webhooks of a team: addresses that hear of its events."""

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from domain.errors import Conflict, NotFound
from domain.ids import new_id
from domain.webhook import EventType, new_secret
from registry import audit, outbox
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import Webhook, WebhookDelivery

MOST_WEBHOOKS = 20
"""Of one team: every event is written once for each."""


def create_webhook(
    session: Session,
    *,
    team_id: str,
    url: str,
    description: str,
    event_types: Sequence[EventType],
    actor: str,
) -> Webhook:
    """`event_types` empty: all. Raises Conflict(code="too_many_webhooks")."""
    known = session.scalars(select(Webhook.id).where(Webhook.team_id == team_id).limit(MOST_WEBHOOKS)).all()
    if len(known) == MOST_WEBHOOKS:
        raise Conflict(f"A team has at most {MOST_WEBHOOKS} webhooks.", code="too_many_webhooks")
    webhook = Webhook(
        id=new_id("hook"),
        team_id=team_id,
        url=url,
        description=description,
        event_types=list(event_types),
        secret=new_secret(),
        created_at=db_now(session),
    )
    session.add(webhook)
    session.flush()
    audit.record(
        session,
        team_id=team_id,
        actor=actor,
        action="webhook.create",
        object_id=webhook.id,
        data={"url": url, "event_types": webhook.event_types},
    )
    return webhook


def get_webhook(session: Session, team_id: str, id: str) -> Webhook:
    """Raises NotFound, also for another team's webhook."""
    found = session.scalars(select(Webhook).where(Webhook.team_id == team_id, Webhook.id == id)).one_or_none()
    if found is None:
        raise NotFound(f"There is no webhook '{id}'.", param="webhook")
    return found


def list_webhooks(session: Session, team_id: str, after: str | None, limit: int) -> Page[Webhook]:
    return read_page(
        session,
        select(Webhook).where(Webhook.team_id == team_id),
        key=Webhook.id,
        order=[Webhook.created_at, Webhook.id],
        after=after,
        limit=limit,
    )


def delete_webhook(session: Session, webhook: Webhook, actor: str) -> None:
    """With its deliveries: what waits is not sent any more."""
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook.id))
    session.execute(delete(Webhook).where(Webhook.id == webhook.id))
    audit.record(
        session,
        team_id=webhook.team_id,
        actor=actor,
        action="webhook.delete",
        object_id=webhook.id,
        data={"url": webhook.url},
    )


def send_test(session: Session, webhook: Webhook, actor: str) -> WebhookDelivery:
    """Queue an event of type `webhook.test` for this webhook alone, whatever it subscribed to."""
    entry = audit.record(
        session,
        team_id=webhook.team_id,
        actor=actor,
        action="webhook.test",
        object_id=webhook.id,
        data={},
    )
    id = outbox.enqueue(session, webhook, "webhook.test", entry)
    return session.scalars(select(WebhookDelivery).where(WebhookDelivery.id == id)).one()


def list_deliveries(
    session: Session, webhook: Webhook, after: str | None, limit: int
) -> Page[WebhookDelivery]:
    """Newest first."""
    return read_page(
        session,
        select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook.id),
        key=WebhookDelivery.id,
        order=[WebhookDelivery.seq],
        after=after,
        limit=limit,
        newest_first=True,
    )
