"""One completion's way to an inference engine: lease, request, patience, retry."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import aiohttp
import anyio
from starlette.types import Receive
from yarl import URL

from api.stream_errors import Refusal, is_cut_short
from domain.errors import EngineTimeout, EngineUnavailable
from domain.settings import Settings
from serving.client import KEEP_ALIVE_SECONDS
from serving.routes import Lease, RouteTable

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 2
"""Of a request whose reply has not begun: completions have no side effects."""
TakeLease = Callable[[bool, Set[str]], Awaitable[Lease]]


@dataclass(frozen=True)
class Patience:
    """With an engine, in seconds."""

    first_byte: float
    """Of a stream."""
    between_bytes: float
    reply: float
    """Until a whole reply begins."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            settings.engine_first_byte_seconds,
            settings.engine_between_bytes_seconds,
            settings.engine_reply_seconds,
        )


@dataclass(frozen=True)
class Upstream:
    """An engine's reply that has begun, and the lease that keeps its version loaded."""

    lease: Lease
    response: aiohttp.ClientResponse
    patience: Patience
    first: bytes
    """Of a stream; empty for a whole reply, of which the head is there."""
    refusal: Refusal | None = None
    """What a stream held that began with an error."""

    @property
    def status(self) -> int:
        return self.response.status if self.refusal is None else self.refusal.status

    @property
    def succeeded(self) -> bool:
        return _succeeded(self.status)

    @property
    def retry_after(self) -> float | None:
        """Seconds that the engine asks to wait, if it says so in a way that can be passed on."""
        given = self.response.headers.get("retry-after", "")
        return float(given) if given.isdigit() and len(given) < 6 else None

    async def read(self) -> bytes:
        """A whole reply's body. Raises EngineTimeout, EngineUnavailable."""
        if self.refusal is not None:
            return self.refusal.body
        try:
            async with asyncio.timeout(self.patience.between_bytes):
                return self.first + await self.response.content.read()
        except aiohttp.ClientError as error:
            raise EngineUnavailable("The inference engine broke off; try again shortly.") from error
        except TimeoutError as error:
            raise _silent(self.patience.between_bytes) from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """A stream's bytes. Raises EngineTimeout, EngineUnavailable."""
        chunk, rest = self.first, self.response.content
        try:
            while chunk:
                yield chunk
                async with asyncio.timeout(self.patience.between_bytes):
                    chunk = await rest.readany()
        except aiohttp.ClientError as error:
            raise EngineUnavailable("The inference engine broke off.") from error
        except TimeoutError as error:
            raise _silent(self.patience.between_bytes) from error

    def close(self) -> None:
        """Ends the engine's work too when the reply was not read to its end."""
        try:
            self.response.close()
        finally:
            self.lease.release()


def engine_client(settings: Settings) -> aiohttp.ClientSession:
    """The gateway's connections to the engines, to be made on the event loop. Patience with replies is
    `open_upstream`'s business.

    aiohttp, because the gateway's own time is most of what it adds to a first token: the parser is C, and
    head and body of a request leave together. httpx takes twice as long for the way to an engine.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.engine_connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


async def open_upstream(
    client: aiohttp.ClientSession,
    routes: RouteTable,
    take_lease: TakeLease,
    path: str,
    payload: dict[str, Any],
    request_id: str,
    patience: Patience,
) -> Upstream:
    """Send the request, at most ATTEMPTS times, and wait until the reply begins.

    `take_lease(lost, avoid)` resolves the model anew for each attempt; `lost` tells that the engine of the
    last one did not have it loaded nor another one before it, `avoid` holds the urls of engines that failed.
    The first 404 of one of several engines is no attempt: no work was begun. Nothing is sent again
    after a timeout: the engine may be at work on it, and asking again would only double that.
    Raises EngineTimeout, EngineUnavailable when no engine begins a reply.
    """
    lost, avoid = False, set[str]()
    unavailable = EngineUnavailable("The inference engine does not answer; try again shortly.")
    left = ATTEMPTS
    while left:
        left -= 1
        lease = await take_lease(lost, avoid)
        try:
            upstream = await attempt(client, lease, path, payload, request_id, patience)
        except aiohttp.ClientError as error:
            lease.release()
            problem = str(error) or type(error).__name__
            logger.warning("engine %s gave no reply: %s", lease.url, problem)
            routes.suspect(lease.url)
            # Not what is in `problem`: the engines' addresses are nobody's business.
            unavailable = EngineUnavailable("The inference engine does not answer; try again shortly.")
        except BaseException:
            lease.release()
            raise
        else:
            routes.trust(lease.url)
            status = upstream.status
            again = status in (404, 503) or (status == 429 and lease.replicas > 1 and left > 0)
            if not again:
                return upstream
            problem = f"HTTP {status} for '{lease.engine_model}'"
            logger.warning("engine %s: %s", lease.url, problem)
            unavailable = EngineUnavailable(
                f"The inference engine does not answer ({problem}); try again shortly."
            )
            unavailable.retry_after_seconds = upstream.retry_after
            upstream.close()
            # An engine that started anew has lost its adapters, and can get them back; that takes the ledger
            # and a load, so another one that may hold them is asked first.
            elsewhere = lease.replicas > 1 and not avoid
            lost = status == 404 and not elsewhere
            if lost:
                continue
            if status == 404:
                left += 1
        avoid.add(lease.url)
    raise unavailable


async def attempt(
    client: aiohttp.ClientSession,
    lease: Lease,
    path: str,
    payload: dict[str, Any],
    request_id: str,
    patience: Patience,
) -> Upstream:
    """Send the request once, and wait until a reply begins, whatever its status; `lease` stays held.

    An engine that streams sends its status before it is at work on the request: an error in place of the
    first words counts as that error's status.
    Raises EngineTimeout, aiohttp.ClientError.
    """
    body = {**payload, "model": lease.engine_model}
    streamed = bool(payload.get("stream"))
    seconds = patience.first_byte if streamed else patience.reply
    response = None
    try:
        async with asyncio.timeout(seconds):
            response = await client.post(
                URL(f"{lease.url.rstrip('/')}{path}", encoded=True),
                data=json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(),
                headers={
                    "content-type": "application/json",
                    "x-request-id": request_id,
                    "accept-encoding": "identity",
                },
                allow_redirects=False,
            )
            first = b""
            if streamed and _succeeded(response.status):
                first = await response.content.readany()
                if not first:
                    raise aiohttp.ServerDisconnectedError("the stream ended before it began")
                while is_cut_short(first) and (more := await response.content.readany()):
                    first += more
        refusal = Refusal.from_start(first)
        return Upstream(lease, response, patience, first, refusal)
    except BaseException as error:
        if response is not None:
            response.close()
        # One that failed to connect in time is both.
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
            raise _silent(seconds) from error
        raise


def _succeeded(status: int) -> bool:
    return 200 <= status < 300


def _silent(seconds: float) -> EngineTimeout:
    return EngineTimeout(f"The inference engine was silent for {seconds:g} s.")


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the client went away first; `work` is then cancelled."""
    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(_when_disconnected(receive, scope.cancel))
        try:
            # Here and not in a task of its own: what has a result in the moment that the client leaves
            # returns it, and holds its lease no longer than its caller does.
            return await work
        finally:
            watcher.cancel()
    return None


async def _when_disconnected(receive: Receive, then: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    then()
