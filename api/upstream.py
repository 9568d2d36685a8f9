"""One completion's way to an inference engine: lease, request, patience, retry."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Set
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import anyio
import httpx
from fastapi import Request

from domain.errors import EngineTimeout, EngineUnavailable
from domain.settings import Settings
from serving.client import KEEP_ALIVE_SECONDS
from serving.routes import Lease, RouteTable

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 2
"""Of a request whose reply has not begun: completions have no side effects."""
SEND_SECONDS = 60.0
"""For a request's body, in one go."""
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
    response: httpx.Response
    patience: Patience
    first: bytes
    """Of a stream; empty for a whole reply, of which the head is there."""
    rest: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """A whole reply's body. Raises EngineTimeout, EngineUnavailable."""
        try:
            async with asyncio.timeout(self.patience.between_bytes):
                return self.first + b"".join([chunk async for chunk in self.rest])
        except TimeoutError as error:
            raise _silent(self.patience.between_bytes) from error
        except httpx.TransportError as error:
            raise EngineUnavailable("The inference engine broke off; try again shortly.") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """A stream's bytes. Raises EngineTimeout, EngineUnavailable."""
        chunk = self.first
        try:
            while chunk:
                yield chunk
                async with asyncio.timeout(self.patience.between_bytes):
                    chunk = await anext(self.rest, b"")
        except TimeoutError as error:
            raise _silent(self.patience.between_bytes) from error
        except httpx.TransportError as error:
            raise EngineUnavailable("The inference engine broke off.") from error

    async def aclose(self) -> None:
        """Ends the engine's work too when the reply was not read to its end."""
        try:
            with anyio.CancelScope(shield=True):
                await self.response.aclose()
        finally:
            self.lease.release()


def engine_client(settings: Settings) -> httpx.AsyncClient:
    """The gateway's connections to the engines. Patience with replies is `open_upstream`'s business."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=settings.engine_connect_seconds, write=SEND_SECONDS),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_SECONDS
        ),
        trust_env=False,
    )


async def open_upstream(
    client: httpx.AsyncClient,
    routes: RouteTable,
    take_lease: TakeLease,
    path: str,
    payload: dict[str, Any],
    request_id: str,
    patience: Patience,
) -> Upstream:
    """Send the request, at most ATTEMPTS times, and wait until the reply begins.

    `take_lease(lost, avoid)` resolves the model anew for each attempt; `lost` tells that the engine of the
    last one did not have it loaded, `avoid` holds the urls of engines that failed. Nothing is sent again
    after a timeout: the engine may be at work on it, and asking again would only double that.
    Raises EngineTimeout, EngineUnavailable when no engine begins a reply.
    """
    lost, avoid = False, set[str]()
    unavailable = EngineUnavailable("The inference engine does not answer; try again shortly.")
    for number in range(1, ATTEMPTS + 1):
        lease = await take_lease(lost, avoid)
        try:
            upstream = await attempt(client, lease, path, payload, request_id, patience)
        except httpx.TransportError as error:
            lease.release()
            problem = str(error) or type(error).__name__
            logger.warning("engine %s gave no reply: %s", lease.url, problem)
            routes.suspect(lease.url)
            unavailable = EngineUnavailable(
                f"The inference engine does not answer ({problem}); try again shortly."
            )
        except BaseException:
            lease.release()
            raise
        else:
            routes.trust(lease.url)
            status = upstream.response.status_code
            again = status in (404, 503) or (status == 429 and lease.replicas > 1 and number < ATTEMPTS)
            if not again:
                return upstream
            problem = f"HTTP {status} for '{lease.engine_model}'"
            logger.warning("engine %s: %s", lease.url, problem)
            unavailable = EngineUnavailable(
                f"The inference engine does not answer ({problem}); try again shortly."
            )
            unavailable.retry_after_seconds = retry_after(upstream.response)
            await upstream.aclose()
            # An engine that started anew has lost its adapters, and can get them back.
            lost = status == 404
            if lost:
                continue
        avoid.add(lease.url)
    raise unavailable


async def attempt(
    client: httpx.AsyncClient,
    lease: Lease,
    path: str,
    payload: dict[str, Any],
    request_id: str,
    patience: Patience,
) -> Upstream:
    """Send the request once, and wait until a reply begins, whatever its status; `lease` stays held.

    Raises EngineTimeout, httpx.TransportError.
    """
    request = client.build_request(
        "POST",
        f"{lease.url.rstrip('/')}{path}",
        json={**payload, "model": lease.engine_model},
        headers={"x-request-id": request_id, "accept-encoding": "identity"},
    )
    streamed = bool(payload.get("stream"))
    seconds = patience.first_byte if streamed else patience.reply
    response = None
    try:
        async with asyncio.timeout(seconds):
            response = await client.send(request, stream=True)
            rest = response.aiter_bytes()
            first = b""
            if streamed and response.is_success:
                first = await anext(rest, b"")
                if not first:
                    raise httpx.RemoteProtocolError("the stream ended before it began")
        return Upstream(lease, response, patience, first, rest)
    except BaseException as error:
        if response is not None:
            with anyio.CancelScope(shield=True):
                await response.aclose()
        if isinstance(error, TimeoutError):
            raise _silent(seconds) from error
        raise


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the engine asks to wait, if it says so in a way that can be passed on."""
    given = response.headers.get("retry-after", "")
    return float(given) if given.isdigit() and len(given) < 6 else None


def _silent(seconds: float) -> EngineTimeout:
    return EngineTimeout(f"The inference engine was silent for {seconds:g} s.")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client went away first; `work` is then cancelled."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        # A task that finished in the same moment has a result, and it must not be lost.
        return None if task.cancelled() else task.result()
    finally:
        watcher.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
