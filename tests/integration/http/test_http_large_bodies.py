"""What others wait for while a large body is read: real server, real clients."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.edge import MAX_BODY_BYTES
from api.gateway_fields import MAX_MESSAGES
from domain.settings import Settings
from tests.integration.http.assertions import refused
from tests.integration.http.conftest import SKILL
from tests.integration.http.stack import ASK, CHAT, Stack, running

DEMOS = "/v1/assistants/support/skills/route/demonstrations"
JSON = {"content-type": "application/json"}


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    with running(settings, base_folder) as one:
        one.client.timeout = httpx.Timeout(60)
        yield one


def numbers(size: int) -> bytes:
    """A list of about `size` bytes, which costs a parser ten times what a string does."""
    return b"[" + b"12345," * (size // 6) + b"0]"


class Ticks:
    """Asks for the API's health without a pause; `count`: how often it answered."""

    def __init__(self, url: str) -> None:
        self.count = 0
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._ended.is_set():
                assert client.get("/healthz").status_code == 200
                self.count += 1

    def __enter__(self) -> "Ticks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_large_batch_holds_up_nobody(stack: Stack) -> None:
    """Its unknown field is found when all of it has been read. The interpreter's own parser lets ten
    questions be answered, before it and after it."""
    assert stack.client.post("/v1/assistants/support/skills", json=SKILL).status_code == 201
    content = b'{"demonstrations": [], "more": ' + numbers(12 * 2**20) + b"}"
    with Ticks(stack.url) as ticks:
        reply = stack.client.post(DEMOS, content=content, headers=JSON)
    refused(reply, 422, param="more", code="invalid_input")
    assert ticks.count > 100


def test_a_large_completion_is_answered(stack: Stack) -> None:
    message = {"role": "user", "content": "größe " * (MAX_BODY_BYTES // 10)}
    content = json.dumps({**ASK, "messages": [message]}, ensure_ascii=False).encode()
    assert MAX_BODY_BYTES // 2 < len(content) < MAX_BODY_BYTES
    assert stack.client.post(CHAT, content=content, headers=JSON).status_code == 200
    assert stack.engine.requests[-1]["messages"] == [message]
    broken = stack.client.post(CHAT, content=content[:-1], headers=JSON)
    refused(broken, 400, param=None, code="invalid_json")


def test_only_so_many_messages_are_taken(stack: Stack) -> None:
    message = {"role": "user", "content": "a"}
    most = stack.client.post(CHAT, json={**ASK, "messages": [message] * MAX_MESSAGES})
    assert most.status_code == 200
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}] * MAX_MESSAGES}
    for messages in ([message] * (MAX_MESSAGES + 1), [message, parts]):
        reply = stack.client.post(CHAT, json={**ASK, "messages": messages})
        refused(reply, 400, param="messages", code="invalid_input")
