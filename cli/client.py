"""The HTTP client of the command line: plain JSON in and out, errors as one line."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from cli.errors import CliError

DEFAULT_PORT = 8400
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
NO_MORE_EVENTS = 204
"""Reply to a client that reconnects after an update's last event."""
TIMEOUT = httpx.Timeout(120, connect=5)
STREAM_TIMEOUT = httpx.Timeout(60, connect=5)
"""The API sends a comment line at least every 15 s on a quiet event stream."""
RECONNECTS = 20
RECONNECT_SECONDS = 1.0

Json = dict[str, Any]


class ApiError(CliError):
    """An error that the API reported, in its own words."""

    def __init__(self, status: int, message: str, param: str | None, code: str | None) -> None:
        field = f" (field: {param})" if param and param not in message else ""
        super().__init__(f"{message}{field}")
        self.status = status
        self.param = param
        self.code = code


class ConnectionLost(CliError):
    """Nothing answers, or the answer broke off."""


@dataclass(frozen=True)
class Reply:
    """A chat answer and the version that gave it."""

    text: str
    version: str | None


class Client:
    """One API. Every method raises ApiError for an error reply and CliError when nothing answers."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None):
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, transport=transport)

    @classmethod
    def from_environment(cls) -> Self:
        return cls(os.environ.get("RATCHET_URL") or DEFAULT_URL, os.environ.get("RATCHET_API_KEY"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int | None) -> Json:
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(self, path: str, body: Json) -> Json:
        return self._json("POST", path, json=body)

    def patch(self, path: str, body: Json) -> Json:
        return self._json("PATCH", path, json=body)

    def put(self, path: str, body: Json, *, revision: int | None = None) -> Json:
        """`revision`: only what is still at it is changed."""
        headers = {} if revision is None else {"if-match": f'"{revision}"'}
        return self._json("PUT", path, json=body, headers=headers)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path)

    def post_jsonl(self, path: str, body: bytes, *, dry_run: bool = False) -> Json:
        params = {"dry_run": "true"} if dry_run else {}
        headers = {"content-type": "application/jsonl"}
        return self._json("POST", path, content=body, params=params, headers=headers)

    def list_all(self, path: str) -> list[Json]:
        """Every object of a paged list."""
        found: list[Json] = []
        while True:
            page = self.get(path, limit=100, after=page_end(found))
            found += page["data"]
            if not page["has_more"]:
                return found

    def chat(
        self, model: str, messages: list[Json], *, max_tokens: int = 256, temperature: float = 0.0
    ) -> Reply:
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        response = self._send("POST", "/v1/chat/completions", json=body)
        choice = response.json()["choices"][0]
        return Reply(choice["message"]["content"] or "", response.headers.get("x-model-version"))

    def chat_streamed(
        self,
        model: str,
        messages: list[Json],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        on_piece: Callable[[str], None] | None = None,
    ) -> Reply:
        """As `chat`, but streamed; `on_piece` sees the text as it is generated."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        text, ended = "", False
        with self._open("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            for event in parse_events(response.iter_lines()):
                if event.data == "[DONE]":
                    ended = True
                    break
                chunk = json.loads(event.data)
                if "error" in chunk:
                    raise CliError(str(chunk["error"]["message"]))
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    text += piece
                    if on_piece is not None:
                        on_piece(piece)
            version = response.headers.get("x-model-version")
        if not ended:
            raise CliError("the stream broke off before its end")
        return Reply(text, version)

    def follow(self, update_id: str) -> Iterator[Json]:
        """Events of an update until it has ended; survives lost connections."""
        last, lost = "", 0
        while True:
            headers = {"last-event-id": last} if last else {}
            try:
                with self._open("GET", f"/v1/updates/{update_id}/events", headers=headers) as response:
                    if response.status_code == NO_MORE_EVENTS:
                        return
                    for event in parse_events(response.iter_lines()):
                        if event.name == "done":
                            return
                        last, lost = event.id or last, 0
                        yield json.loads(event.data)
            except ConnectionLost:
                if lost >= RECONNECTS:
                    raise
            lost += 1
            time.sleep(RECONNECT_SECONDS)

    def _json(self, method: str, path: str, **options: Any) -> Json:
        value: Json = self._send(method, path, **options).json()
        return value

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise self._error(response)
        return response

    @contextmanager
    def _open(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A response whose body is still to come, as server-sent events."""
        headers = {"accept": "text/event-stream", **options.pop("headers", {})}
        try:
            with self._http.stream(
                method, path, headers=headers, timeout=STREAM_TIMEOUT, **options
            ) as response:
                if response.is_error:
                    response.read()
                    raise self._error(response)
                yield response
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> "ConnectionLost":
        if isinstance(error, httpx.ConnectError):
            return ConnectionLost(
                f"nothing answers at {self.url}: start the stack with `ratchet up`, "
                "or set RATCHET_URL to where it runs"
            )
        return ConnectionLost(f"{self.url} did not answer properly: {type(error).__name__} {error}".rstrip())

    def _error(self, response: httpx.Response) -> CliError:
        try:
            told = response.json()["error"]
            return ApiError(response.status_code, told["message"], told["param"], told["code"])
        except (ValueError, KeyError, TypeError):
            return CliError(
                f"{response.request.url} replied {response.status_code}, which is not an error of Ratchet's "
                "API: does RATCHET_URL point at it?"
            )


@dataclass(frozen=True)
class ServerEvent:
    name: str
    id: str
    data: str


def parse_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Server-sent events with data, from the lines of their stream; comments are skipped."""
    name, event_id, data = "", "", list[str]()
    for line in lines:
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("id:"):
            event_id = line[3:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield ServerEvent(name, event_id, "\n".join(data))
            name, data = "", []


def page_end(found: list[Json]) -> str | None:
    """The `after` of the page that follows what was found so far."""
    return str(found[-1]["id"]) if found else None
