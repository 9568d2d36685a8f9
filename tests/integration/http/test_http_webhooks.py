"""Webhooks against a real receiver, verified by another implementation of the format."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import InvalidWebhookSignatureError, OpenAI

from api import outbox_sender
from api.app import create_app
from api.context import TEAM_ID, Context
from api.webhook_address import is_public
from domain import webhook
from domain.settings import Settings
from registry import webhooks
from tests.integration.http.assertions import refused
from tests.integration.http.conftest import SKILL

DEMOS = "/v1/assistants/support/skills/route/demonstrations"


class Receiver:
    """Answers with `statuses`, one after the other, then 204; keeps what it was sent."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.received: list[tuple[str, dict[str, str], str]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver.received.append((self.path, dict(self.headers.items()), body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    @contextmanager
    def listening(self) -> Iterator["Receiver"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as listening:
        yield listening


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_sender, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(webhook, "RETRY_SECONDS", (0.1, 0.1, 0.1))


@pytest.fixture
def trusting(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """An API that may send to 127.0.0.1."""
    monkeypatch.setattr("api.rollback.SERVING_SECONDS", 0.0)
    trusted = settings.model_copy(update={"webhook_trusted_hosts": "hooks.example, 127.0.0.1"})
    with TestClient(create_app(trusted), base_url="http://127.0.0.1") as client:
        yield client


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def subscribe(api: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    created = api.post("/v1/webhooks", json={"url": url, **fields})
    assert created.status_code == 201, created.text
    body: dict[str, Any] = created.json()
    return body


def newest(api: TestClient, hook: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = api.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["data"]
    return rows[0]


def test_events_arrive_signed(trusting: TestClient, base_folder: Any, receiver: Receiver) -> None:
    hook = subscribe(trusting, receiver.url, event_types=["update.created", "update.cancelled"])
    trusting.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
    trusting.post("/v1/assistants/support/skills", json=SKILL)
    trusting.post(DEMOS, json={"demonstrations": [{"prompt": "p", "response": "r"}]})
    update = trusting.post("/v1/assistants/support/updates", json={}).json()
    assert trusting.post(f"/v1/updates/{update['id']}/cancel").status_code == 200
    await_that(lambda: len(receiver.received) == 2)

    verifier = OpenAI(api_key="unused", webhook_secret=hook["secret"]).webhooks
    told = []
    for path, headers, body in receiver.received:
        verifier.verify_signature(body, headers)
        with pytest.raises(InvalidWebhookSignatureError):
            verifier.verify_signature(body.replace("update", "upgrade"), headers)
        assert path == "/hook"
        told.append(body)
    assert sum('"type":"update.created"' in body for body in told) == 1
    assert sum('"type":"update.cancelled"' in body for body in told) == 1
    assert all(update["id"] in body for body in told)
    assert {headers["webhook-id"] for _, headers, _ in receiver.received} == {
        row["id"] for row in trusting.get(f"/v1/webhooks/{hook['id']}/deliveries").json()["data"]
    }


def test_a_webhook_is_listed_tested_and_deleted(trusting: TestClient, receiver: Receiver) -> None:
    hook = subscribe(trusting, receiver.url, description="mine")
    secret = hook.pop("secret")
    assert trusting.get(f"/v1/webhooks/{hook['id']}").json() == hook
    assert trusting.get("/v1/webhooks").json()["data"] == [hook]
    for path in ("/v1/webhooks", f"/v1/webhooks/{hook['id']}", "/v1/audit_logs"):
        assert secret not in trusting.get(path).text
    sent = trusting.post(f"/v1/webhooks/{hook['id']}/test")
    assert (sent.status_code, sent.json()["type"]) == (202, "webhook.test")
    await_that(lambda: newest(trusting, hook)["delivered_at"] is not None)
    assert newest(trusting, hook)["status_code"] == 204
    assert [headers["webhook-id"] for _, headers, _ in receiver.received] == [sent.json()["id"]]
    gone = trusting.delete(f"/v1/webhooks/{hook['id']}")
    assert gone.json() == {"id": hook["id"], "object": "webhook.deleted", "deleted": True}
    refused(trusting.get(f"/v1/webhooks/{hook['id']}"), 404, param="webhook", code="not_found")


def test_a_failing_receiver_is_tried_again_under_the_same_id(
    trusting: TestClient, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302]
    hook = subscribe(trusting, receiver.url)
    id = trusting.post(f"/v1/webhooks/{hook['id']}/test").json()["id"]
    await_that(lambda: newest(trusting, hook)["delivered_at"] is not None)
    assert newest(trusting, hook)["attempts"] == 3
    assert [path for path, _, _ in receiver.received] == ["/hook"] * 3, "a redirect was followed"
    assert {headers["webhook-id"] for _, headers, _ in receiver.received} == {id}


def test_a_receiver_that_is_down_ends_as_given_up(trusting: TestClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen; nobody else can either
        hook = subscribe(trusting, f"http://127.0.0.1:{closed.getsockname()[1]}/hook")
        trusting.post(f"/v1/webhooks/{hook['id']}/test")
        await_that(lambda: newest(trusting, hook)["next_attempt_at"] is None)
    row = newest(trusting, hook)
    assert (row["attempts"], row["delivered_at"], row["status_code"]) == (4, None, None)
    assert row["error"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "https://127.0.0.1/hook",
        "https://127.1/hook",
        "https://2130706433/hook",
        "https://localhost/hook",
        "https://[::1]/hook",
        "https://[::ffff:127.0.0.1]/hook",
        "https://10.0.0.1/hook",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/hook",
        "https://0.0.0.0/hook",
        "https://user:password@example.com/hook",
        "ftp://example.com/hook",
        "file:///etc/passwd",
        "https:///hook",
        "//example.com",
        "",
    ],
)
def test_private_and_odd_addresses_are_refused(api: TestClient, url: str) -> None:
    refused(api.post("/v1/webhooks", json={"url": url}), 422, param="url", code="url_not_allowed")
    assert api.get("/v1/webhooks").json()["data"] == []


def test_the_address_is_checked_again_when_sending(api: TestClient, receiver: Receiver) -> None:
    """As when a name resolved to a public address at first and to a private one later."""
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    with context.sessions.begin() as session:
        row = webhooks.create_webhook(
            session,
            team_id=TEAM_ID,
            url=receiver.url.replace("http:", "https:"),
            description="",
            event_types=[],
            actor="user",
        )
    api.post(f"/v1/webhooks/{row.id}/test")
    await_that(lambda: newest(api, {"id": row.id})["error"] is not None)
    assert newest(api, {"id": row.id})["error"] == "'127.0.0.1' is not a public address."
    assert receiver.received == []


def test_public_addresses() -> None:
    from ipaddress import ip_address

    private = (
        "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 "
        "255.255.255.255 240.0.0.1 ::1 :: fe80::1 fc00::1 ff02::1 fec0::1 ::ffff:10.0.0.1 "
        "64:ff9b::a00:1 2002:7f00:1:: 2001:0:53aa:64c::1"
    )
    public = "93.184.216.34 8.8.8.8 2606:4700:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"
    assert [one for one in private.split() if is_public(ip_address(one))] == []
    assert [one for one in public.split() if not is_public(ip_address(one))] == []
