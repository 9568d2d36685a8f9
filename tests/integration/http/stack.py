"""The API and an engine, both listening; the assistant `support` answers with its base model."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from registry import serving
from tests.integration.http.engine import WORDS, Engine
from tests.integration.http.server import served

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Stack:
    client: httpx.Client
    engine: Engine
    context: Context
    url: str

    def stream(self, **fields: Any) -> Any:
        return self.client.stream("POST", CHAT, json={**ASK, "stream": True, **fields})

    def leases(self) -> int:
        """Requests in flight at the engine, as the route table counts them."""
        routes = self.context.routes
        endpoints = {end for route in routes.routes.versions.values() for end in route.endpoints}
        return sum(routes.leases(endpoint) for endpoint in endpoints)

    def await_no_leases(self) -> None:
        """A lease ends just after the reply's last byte, which the client may have read by then."""
        deadline = time.monotonic() + 10
        while self.leases():
            assert time.monotonic() < deadline, "a lease outlives its request"
            time.sleep(0.01)

    def await_version(self, number: int) -> None:
        with self.context.sessions() as session:
            wanted = next(one for one in serving.wanted(session) if one.alias == "champion")
        assert wanted.number == number
        assert self.context.controller.wait_serving(wanted.assistant_id, "champion", wanted.version_id, 10)


@contextmanager
def running(settings: Settings, base_folder: Path, *others: Engine) -> Iterator[Stack]:
    """`others` are engines beside the stack's own."""
    engine = Engine("tiny-base")
    app: FastAPI = create_app(settings)
    with ExitStack() as engines, served(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        context: Context = app.state.context
        for one in (engine, *others):
            engine_url = engines.enter_context(served(one.app))
            with context.sessions.begin() as session:
                serving.register_replica(session, engine_url, str(base_folder), "tiny-base")
        created = client.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
        assert created.status_code == 201, created.text
        stack = Stack(client, engine, context, url)
        stack.await_version(0)
        yield stack
        engine.gate.set()


def answer(model: str) -> str:
    return "".join(WORDS).replace("<model>", model)


def contents(reply: httpx.Response) -> Iterator[tuple[str, str]]:
    """(model, text) of each chunk of a stream, until [DONE]."""
    rest = ""
    for text in reply.iter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                yield chunk["model"], chunk["choices"][0]["delta"]["content"]
            elif line:
                assert line == "data: [DONE]"
                yield "", "[DONE]"
