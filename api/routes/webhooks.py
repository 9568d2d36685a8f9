"""Webhooks: addresses that are told of updates, versions and aliases, signed as Standard Webhooks are."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import Field
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.fields import Body, Text
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import DeletedReply, DeliveryReply, NewWebhookReply, WebhookReply
from api.webhook_address import resolve
from domain.webhook import EventType
from registry import webhooks
from registry.tables import Webhook, WebhookDelivery

router = APIRouter(tags=["webhooks"])


class NewWebhook(Body):
    url: Annotated[Text, Field(max_length=2000)]
    """https, at a public address; others only when RATCHET_WEBHOOK_TRUSTED_HOSTS names the host."""
    description: Text = ""
    event_types: Annotated[list[EventType], Field(default_factory=list, max_length=20)]
    """Default: all."""


async def _reachable(body: NewWebhook, context: Ctx) -> NewWebhook:
    """Refused here rather than at the first event; every attempt checks again."""
    await resolve(body.url, context.settings.webhook_trusted_hosts)
    return body


@router.post("/v1/webhooks", status_code=201, response_model=NewWebhookReply)
def create_webhook(
    body: Annotated[NewWebhook, Depends(_reachable)], team_id: Team, creation: Creating
) -> Response:
    """The reply holds the secret that signs the deliveries; no other reply does."""

    def work(session: Session) -> NewWebhookReply:
        row = webhooks.create_webhook(
            session,
            team_id=team_id,
            url=body.url,
            description=body.description,
            event_types=body.event_types,
            actor=ACTOR,
        )
        return NewWebhookReply(**_webhook_reply(row).model_dump(), secret=row.secret)

    return creation.run(work)


@router.get("/v1/webhooks")
def list_webhooks(
    session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[WebhookReply]:
    page = webhooks.list_webhooks(session, team_id, paging.after, paging.limit)
    return listing([_webhook_reply(row) for row in page.rows], has_more=page.has_more)


@router.get("/v1/webhooks/{webhook}")
def get_webhook(webhook: str, session: Reading, team_id: Team) -> WebhookReply:
    return _webhook_reply(webhooks.get_webhook(session, team_id, webhook))


@router.delete("/v1/webhooks/{webhook}")
def delete_webhook(webhook: str, context: Ctx, team_id: Team) -> DeletedReply:
    """Nothing more is sent, what waits included."""
    with context.sessions.begin() as session:
        row = webhooks.get_webhook(session, team_id, webhook)
        webhooks.delete_webhook(session, row, ACTOR)
    return DeletedReply(id=row.id, object="webhook.deleted")


@router.post("/v1/webhooks/{webhook}/test", status_code=202, response_model=DeliveryReply)
def test_webhook(webhook: str, team_id: Team, creation: Creating) -> Response:
    """Queue an event of type `webhook.test`; its fate is in the webhook's deliveries."""

    def work(session: Session) -> DeliveryReply:
        row = webhooks.get_webhook(session, team_id, webhook)
        return _delivery_reply(webhooks.send_test(session, row, ACTOR))

    return creation.run(work, status_code=202)


@router.get("/v1/webhooks/{webhook}/deliveries")
def list_deliveries(
    webhook: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[DeliveryReply]:
    """Newest first."""
    row = webhooks.get_webhook(session, team_id, webhook)
    page = webhooks.list_deliveries(session, row, paging.after, paging.limit)
    return listing([_delivery_reply(one) for one in page.rows], has_more=page.has_more)


def _webhook_reply(row: Webhook) -> WebhookReply:
    return WebhookReply(
        id=row.id,
        url=row.url,
        description=row.description,
        event_types=row.event_types,
        disabled_because=row.disabled_because,
        created_at=int(row.created_at),
    )


def _delivery_reply(row: WebhookDelivery) -> DeliveryReply:
    return DeliveryReply(
        id=row.id,
        webhook=row.webhook_id,
        type=row.type,
        attempts=row.attempts,
        next_attempt_at=None if row.next_attempt_at is None else int(row.next_attempt_at),
        delivered_at=None if row.delivered_at is None else int(row.delivered_at),
        status_code=row.status_code,
        error=row.error,
        created_at=int(row.created_at),
    )
