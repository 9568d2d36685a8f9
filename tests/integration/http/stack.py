"""The API and an engine, both listening; the assistant `support` answers with its base model."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from registry import serving
from tests.integration.http.engine import WORDS, Engine
from tests.integration.http.server import served

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hello"}]}
PATIENCE = 60.0
"""Seconds until what should come at once counts as hanging: a busy machine stands still for some."""


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
        until(lambda: not self.leases(), "a lease outlives its request")

    def await_version(self, number: int) -> None:
        with self.context.sessions() as session:
            wanted = next(one for one in serving.wanted(session) if one.alias == "champion")
        assert wanted.number == number
        assert self.context.controller.wait_serving(
            wanted.assistant_id, "champion", wanted.version_id, PATIENCE
        )


@contextmanager
def running(settings: Settings, base_folder: Path, *others: Engine) -> Iterator[Stack]:
    """`others` are engines beside the stack's own."""
    engine = Engine("tiny-base")
    app: FastAPI = create_app(settings)
    with (
        patient(),
        ExitStack() as engines,
        served(app) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
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


@contextmanager
def patient() -> Iterator[None]:
    """A reply that waits for a version to answer does so for PATIENCE: what is asserted is that it came to
    answer, not how soon."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("api.rollback.SERVING_SECONDS", PATIENCE)
        yield


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until the condition holds; fails with `what` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


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
