"""Webhooks in the Standard Webhooks format: event types, secrets, signatures, when to try again.

Source: github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md.
"""

import base64
import hashlib
import hmac
import secrets
from typing import Literal

EventType = Literal[
    "update.created",
    "update.paused",
    "update.succeeded",
    "update.failed",
    "update.cancelled",
    "version.published",
    "alias.moved",
    "traffic.changed",
    "canary.rolled_back",
    "webhook.test",
]

RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Pauses after the first, second ... failed attempt: the specification's example, three days in all."""
SECRET_PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signed_headers(secret: str, id: str, timestamp: int, body: str) -> dict[str, str]:
    """The three headers of a delivery; `timestamp` is in unix seconds, of this attempt."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def pause_after(attempts: int) -> float | None:
    """Seconds until the next attempt after `attempts` failed ones; None: give up."""
    return RETRY_SECONDS[attempts - 1] if attempts <= len(RETRY_SECONDS) else None
