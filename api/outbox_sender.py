"""Sends what the outbox holds, and forgets what is old: a task of the API process.

Several API processes may run one each: attempts are claimed in the database.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import httpx
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from api.webhook_address import resolve
from domain.errors import InvalidInput
from domain.webhook import signed_headers
from registry import idempotency, outbox
from registry.outbox import Attempt

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
ATTEMPT_SECONDS = 15.0
"""For a whole attempt, from resolving the name to the reply's status."""
CLAIM_SECONDS = 60.0
AT_ONCE = 8
PURGE_EVERY_SECONDS = 3600.0
KEEP_DELIVERIES_SECONDS = 7 * 86_400.0
KEEP_KEYS_SECONDS = 2 * 86_400.0
"""Clients may repeat a request with its Idempotency-Key for that long; Stripe promises one day."""


@dataclass(frozen=True)
class Outcome:
    status_code: int | None
    error: str | None
    """None: delivered."""


class OutboxSender:
    def __init__(
        self, sessions: sessionmaker[Session], reads: sessionmaker[Session], *, trusted_hosts: str
    ) -> None:
        self._sessions = sessions
        self._reads = reads
        self._trusted_hosts = trusted_hosts
        self._purge_at = time.monotonic()

    async def run(self) -> None:
        """Until cancelled."""
        # No environment's proxies, no redirects, no connection kept: each attempt goes where it was checked.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            timeout=ATTEMPT_SECONDS, trust_env=False, follow_redirects=False, limits=limits
        ) as client:
            while True:
                try:
                    sent = await self._round(client)
                except SQLAlchemyError as error:
                    logger.warning("outbox not read, next try in %g s: %s", POLL_SECONDS, error)
                    sent = 0
                if sent < AT_ONCE:
                    await asyncio.sleep(POLL_SECONDS)

    async def _round(self, client: httpx.AsyncClient) -> int:
        if time.monotonic() >= self._purge_at:
            self._purge_at = time.monotonic() + PURGE_EVERY_SECONDS
            await run_in_threadpool(self._purge)
        attempts = await run_in_threadpool(self._claim)
        await asyncio.gather(*[self._make(client, attempt) for attempt in attempts])
        return len(attempts)

    async def _make(self, client: httpx.AsyncClient, attempt: Attempt) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                outcome = await self._send(client, attempt)
        except TimeoutError:
            outcome = Outcome(None, f"no reply within {ATTEMPT_SECONDS:g} s")
        await run_in_threadpool(self._settle, attempt, outcome)

    async def _send(self, client: httpx.AsyncClient, attempt: Attempt) -> Outcome:
        try:
            target = await resolve(attempt.url, self._trusted_hosts)
            headers = signed_headers(attempt.secret, attempt.id, int(time.time()), attempt.body)
            async with client.stream(
                "POST",
                target.url,
                content=attempt.body.encode(),
                headers={
                    **headers,
                    "host": target.host,
                    "content-type": "application/json",
                    "user-agent": "ratchet-webhooks/1",
                },
                extensions={"sni_hostname": target.server_name},
            ) as reply:
                # The body is the receiver's business and is not read.
                error = None if reply.is_success else f"HTTP {reply.status_code}"
                return Outcome(reply.status_code, error)
        except InvalidInput as error:
            return Outcome(None, error.message)
        except httpx.HTTPError as error:
            return Outcome(None, str(error) or type(error).__name__)

    def _claim(self) -> list[Attempt]:
        with self._reads() as session:
            if not outbox.anything_due(session):
                return []
        with self._sessions.begin() as session:
            return outbox.claim_due(session, limit=AT_ONCE, seconds=CLAIM_SECONDS)

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        with self._sessions.begin() as session:
            if outcome.error is None and outcome.status_code is not None:
                outbox.delivered(session, attempt, outcome.status_code)
                return
            error = outcome.error or ""
            outbox.failed(session, attempt, status_code=outcome.status_code, error=error)
        logger.warning("webhook delivery %s, attempt %d: %s", attempt.id, attempt.number, error)

    def _purge(self) -> None:
        with self._sessions.begin() as session:
            keys = idempotency.purge(session, older_than_seconds=KEEP_KEYS_SECONDS)
            deliveries = outbox.purge(session, older_than_seconds=KEEP_DELIVERIES_SECONDS)
        if keys or deliveries:
            logger.info("forgot %d idempotency keys and %d webhook deliveries", keys, deliveries)
