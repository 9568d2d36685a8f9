"""An engine's replies as clients get them: the model under the name they asked for, errors as OpenAI's."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import error_body, error_response, status_of
from api.stream_errors import ERROR_EVENTS
from api.upstream import Upstream, unless_disconnected
from domain.errors import EngineUnavailable, Overloaded

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Seen by no client: the status under which a request that its client gave up is counted."""
_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies on the way pass each event on as it comes."""


class EngineStream(StreamingResponse):
    """Server-sent events of the engine under the model name that the client asked for."""

    def __init__(
        self,
        upstream: Upstream,
        model: str,
        *,
        on_line: Callable[[bytes], None] | None,
        on_end: Callable[[int], None],
    ) -> None:
        """`on_line` hears the engine's lines; `on_end` 200, or the status that the reply would have had if
        it had not begun."""
        super().__init__(self._events(upstream, model), headers=_UNBUFFERED, media_type="text/event-stream")
        self._upstream = upstream
        self._on_line = on_line
        self._on_end = on_end
        self._status = CLIENT_CLOSED_REQUEST

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self.stream_response(send))
        finally:
            # Also when the client left before the first event was asked for.
            self._upstream.close()
            self._on_end(self._status)

    async def _events(self, upstream: Upstream, model: str) -> AsyncIterator[bytes]:
        rest = b""
        failed = False
        try:
            async for chunk in upstream.chunks():
                *lines, rest = (rest + chunk).split(b"\n")
                failed = failed or any(line.startswith(ERROR_EVENTS) for line in lines)
                if self._on_line is not None:
                    for line in lines:
                        self._on_line(line)
                if lines:
                    yield b"".join(rewrite_line(line, model) + b"\n" for line in lines)
            if rest:
                yield rewrite_line(rest, model)
            self._status = 502 if failed else 200
        except EngineUnavailable as error:
            # Too late for a status: OpenAI's clients raise on an event that holds an error.
            logger.error("engine %s broke off a stream: %s", upstream.lease.url, error)
            self._status = status_of(type(error))
            body = error_body(self._status, error.message, param=None, code=error.code)
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
    status = upstream.status
    message, param, code = _engine_error(content)
    if status >= 500 or status in (401, 403, 405):
        logger.error("engine %s: HTTP %d: %s", upstream.lease.url, status, message)
        return error_response(502, "The inference engine failed on this request.", code="engine_error")
    headers = None
    if status == 400 and "maximum context length" in message:
        code = "context_length_exceeded"  # what OpenAI's users look for when a prompt is too long
    if status == 429:
        code = code or Overloaded.code
        headers = {"retry-after": f"{upstream.retry_after or Overloaded.retry_after_seconds:g}"}
    return error_response(
        status, message.replace(upstream.lease.engine_model, model), param=param, code=code, headers=headers
    )


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
