"""One completion's way to an inference engine and back: lease, request, retry, rewriting of `model`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import httpx
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import error_body, error_response
from domain.errors import EngineUnavailable
from serving.routes import Lease

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 2
"""Of a request whose reply has not begun: completions have no side effects."""


@dataclass(frozen=True)
class Upstream:
    """An engine's reply whose head has arrived, and the lease that keeps its version loaded."""

    lease: Lease
    response: httpx.Response

    async def aclose(self) -> None:
        """Ends the engine's work too when the reply was not read to its end."""
        try:
            with anyio.CancelScope(shield=True):
                await self.response.aclose()
        finally:
            self.lease.release()


async def open_upstream(
    client: httpx.AsyncClient,
    take_lease: Callable[[bool], Awaitable[Lease]],
    path: str,
    payload: dict[str, Any],
    request_id: str,
) -> Upstream:
    """Send the request, at most ATTEMPTS times, and wait for the head of the reply.

    `take_lease(lost)` resolves the model anew for each attempt; `lost` tells that the engine of the last
    one did not have it loaded. Raises EngineUnavailable when no engine begins a reply.
    """
    problem, lost = "", False
    for _ in range(ATTEMPTS):
        lease = await take_lease(lost)
        try:
            request = client.build_request(
                "POST",
                f"{lease.url.rstrip('/')}{path}",
                json={**payload, "model": lease.engine_model},
                headers={"x-request-id": request_id, "accept-encoding": "identity"},
            )
            response = await client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            lease.release()  # it is working on something: asking again would only double that
            raise EngineUnavailable("The inference engine took too long.") from error
        except httpx.TransportError as error:
            lease.release()
            problem = str(error) or type(error).__name__
            logger.warning("engine %s gave no reply: %s", lease.url, problem)
        except BaseException:
            lease.release()
            raise
        else:
            upstream = Upstream(lease, response)
            if response.status_code not in (404, 503):
                return upstream
            # 404: an engine that started anew has lost its adapters. 503: it is stopping.
            lost = response.status_code == 404
            problem = f"HTTP {response.status_code} for '{lease.engine_model}'"
            logger.warning("engine %s: %s", lease.url, problem)
            await upstream.aclose()
    raise EngineUnavailable(f"The inference engine does not answer ({problem}); try again shortly.")


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


class EngineStream(StreamingResponse):
    """Server-sent events of the engine under the model name that the client asked for."""

    def __init__(
        self,
        upstream: Upstream,
        model: str,
        *,
        on_chunk: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(self._events(upstream, model), media_type="text/event-stream")
        self._upstream = upstream
        self._on_chunk = on_chunk
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Also when the client left before the first event was asked for.
            await self._upstream.aclose()
            self._on_end()

    async def _events(self, upstream: Upstream, model: str) -> AsyncIterator[bytes]:
        rest = b""
        try:
            async for chunk in upstream.response.aiter_bytes():
                self._on_chunk()
                *lines, rest = (rest + chunk).split(b"\n")
                if lines:
                    yield b"".join(rewrite_line(line, model) + b"\n" for line in lines)
            if rest:
                yield rewrite_line(rest, model)
        except httpx.TransportError as error:
            # Too late for a status: OpenAI's clients raise on an event that holds an error.
            logger.error("engine %s broke off a stream: %s", upstream.lease.url, error)
            body = error_body(503, "The inference engine broke off.", param=None, code=EngineUnavailable.code)
            yield b"\n\ndata: " + json.dumps(body).encode() + b"\n\n"


def rewrite_line(line: bytes, model: str) -> bytes:
    """One line of a stream, with `model` in place of the engine's own name."""
    if not line.startswith(b"data:"):
        return line
    try:
        value = json.loads(line[5:])
    except ValueError:  # [DONE]
        return line
    if not isinstance(value, dict) or "model" not in value:
        return line
    value["model"] = model
    return b"data: " + json.dumps(value, separators=(",", ":")).encode()


def rewrite_reply(content: bytes, model: str) -> dict[str, Any]:
    """A whole reply with `model` in place of the engine's own name.

    Raises EngineUnavailable for anything but a JSON object.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise EngineUnavailable("The inference engine's reply is not JSON.") from error
    if not isinstance(value, dict):
        raise EngineUnavailable("The inference engine's reply is not a JSON object.")
    value["model"] = model
    return value


def engine_refusal(upstream: Upstream, content: bytes, model: str) -> JSONResponse:
    """The engine's own 4xx in OpenAI's shape; its 5xx without what it says about its insides."""
    status = upstream.response.status_code
    message, param, code = _engine_error(content)
    if status >= 500 or status in (401, 403, 405):
        logger.error("engine %s: HTTP %d: %s", upstream.lease.url, status, message)
        return error_response(502, "The inference engine failed on this request.", code="engine_error")
    return error_response(status, message.replace(upstream.lease.engine_model, model), param=param, code=code)


def _engine_error(content: bytes) -> tuple[str, str | None, str | None]:
    """(message, param, code) of {"error": {...}}, or of the bare inner object that older vLLMs send."""
    try:
        value = json.loads(content)
    except ValueError:
        return content.decode(errors="replace")[:500], None, None
    inner = value.get("error", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("message"), str):
        return str(value)[:500], None, None
    param, code = inner.get("param"), inner.get("code")
    return (
        inner["message"],
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )
