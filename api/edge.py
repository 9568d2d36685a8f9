"""What every request passes first: host and origin check, body limit, request id, metrics, last resort.

A pure ASGI layer, because streamed replies and client disconnects must pass through it untouched.
"""

import logging
import re
import time
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response, internal_error
from api.metrics import Metrics
from domain.ids import new_id

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 64 * 1024 * 1024
"""Of demonstrations and files, which are read beside the event loop."""
MAX_BODY_BYTES = 4 * 1024 * 1024
"""Of everything else, which may be read on it. Prompts of a million tokens fit."""
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Edge:
    def __init__(self, app: ASGIApp, *, allowed_hosts: str, metrics: Metrics) -> None:
        self._app = app
        self._hosts = frozenset(host.strip().lower() for host in allowed_hosts.split(","))
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started_at = time.perf_counter()
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, send_marked)
            else:
                limit = _max_bytes(scope["path"])
                await self._app(scope, _limited(receive, limit), send_marked)
        except Exception:
            logger.exception("%s %s (%s) failed", scope["method"], scope["path"], request_id)
            if status is not None:
                raise  # the reply has begun: only a broken connection can tell the client
            await internal_error()(scope, receive, send_marked)
        finally:
            self._count(scope, status, time.perf_counter() - started_at)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "").lower()
        if "*" not in self._hosts and _without_port(host) not in self._hosts:
            return error_response(
                400,
                f"This API does not answer to the host '{host[:200]}' (RATCHET_ALLOWED_HOSTS).",
                param="Host",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        # A page of another site can make a browser send simple requests here, even without reading the reply.
        if origin is not None and scope["method"] not in _SAFE_METHODS and _host_of(origin) != host:
            return error_response(
                403,
                f"Requests from pages of '{origin[:200]}' are refused.",
                param="Origin",
                code="cross_origin",
            )
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return error_response(400, "The URL holds a NUL character.", code="bad_request")
        length = headers.get("content-length", "")
        limit = _max_bytes(scope["path"])
        if length.isdigit() and int(length) > limit:
            reply = error_response(413, _too_large(limit), code="content_too_large")
            # The rest of the body is on its way and nobody will read it.
            reply.headers["connection"] = "close"
            return reply
        return None

    def _count(self, scope: Scope, status: int | None, seconds: float) -> None:
        # The template, not the path: labels must stay few.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"].isalpha() and len(scope["method"]) < 8 else "other"
        self._metrics.requests.labels(method, route, str(status or "disconnected")).inc()
        self._metrics.request_seconds.labels(method, route).observe(seconds)


def _max_bytes(path: str) -> int:
    return MAX_BATCH_BYTES if path.endswith("/demonstrations") or path == "/v1/files" else MAX_BODY_BYTES


def _limited(receive: Receive, limit: int) -> Receive:
    """A body sent without a length is counted as it streams in."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit))
        return message

    return receive_limited


def _too_large(limit: int) -> str:
    return f"The request body is larger than {limit} bytes."


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _host_of(origin: str) -> str:
    """`http://127.0.0.1:8000` -> `127.0.0.1:8000`; "" for `null` and other oddities."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
