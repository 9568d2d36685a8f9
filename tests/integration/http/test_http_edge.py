"""What holds for every request: ids, hosts, origins, body limits, unknown urls, failures."""

import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.context import Context
from api.edge import MAX_BATCH_BYTES, MAX_BODY_BYTES
from domain.settings import Settings
from tests.integration.http.assertions import refused


def test_every_reply_carries_a_request_id(api: TestClient) -> None:
    own = api.get("/healthz")
    assert own.headers["x-request-id"].startswith("req_")
    assert api.get("/healthz", headers={"x-request-id": "job-17.a"}).headers["x-request-id"] == "job-17.a"
    for odd in ("a b", "x" * 129, "<script>"):
        assert api.get("/healthz", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")
    for path in ("/nowhere", "/v1/assistants/nobody"):
        assert api.get(path, headers={"x-request-id": "id-2"}).headers["x-request-id"] == "id-2"


def test_unknown_urls_and_methods_are_errors_in_the_one_shape(api: TestClient) -> None:
    error = refused(api.get("/v1/nowhere"), 404, param=None, code="unknown_url")
    assert "GET /v1/nowhere" in error["message"]
    reply = api.delete("/v1/assistants")
    refused(reply, 405, param=None, code="method_not_allowed")
    assert reply.headers["allow"]


def test_a_body_that_is_not_json_is_refused(api: TestClient) -> None:
    reply = api.post("/v1/assistants", content=b"{", headers={"content-type": "application/json"})
    refused(reply, 400, param=None, code="invalid_json")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""])
def test_other_hosts_are_refused(api: TestClient, host: str) -> None:
    """A page of another site that resolves its own name to loopback must not be served."""
    refused(api.get("/v1/assistants", headers={"host": host}), 400, param="Host", code="host_not_allowed")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8321", "localhost", "LOCALHOST:1", "[::1]:80"])
def test_loopback_hosts_are_served(api: TestClient, host: str) -> None:
    assert api.get("/v1/assistants", headers={"host": host}).status_code == 200


def test_a_deployment_behind_a_proxy_may_serve_any_host(settings: Settings) -> None:
    anyone = settings.model_copy(update={"allowed_hosts": "*"})
    with TestClient(create_app(anyone), base_url="http://ratchet.example") as client:
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://["])
def test_writes_from_pages_of_other_sites_are_refused(api: TestClient, origin: str) -> None:
    reply = api.post("/v1/assistants/support/rollback", headers={"origin": origin})
    refused(reply, 403, param="Origin", code="cross_origin")
    assert api.get("/v1/assistants", headers={"origin": origin}).status_code == 200


def test_writes_from_our_own_pages_are_served(api: TestClient) -> None:
    reply = api.post("/v1/assistants/support/rollback", headers={"origin": "http://127.0.0.1"})
    refused(reply, 404, param="assistant", code="not_found")


DEMOS = "/v1/assistants/a/skills/s/demonstrations"


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/v1/assistants", MAX_BODY_BYTES), (DEMOS, MAX_BATCH_BYTES), ("/v1/files", MAX_BATCH_BYTES)],
)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    api: TestClient, path: str, limit: int
) -> None:
    headers = {"content-length": str(limit + 1), "content-type": "application/json"}
    reply = api.post(path, content=b"{}", headers=headers)
    error = refused(reply, 413, param=None, code="content_too_large")
    assert str(limit) in error["message"]


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/v1/assistants", MAX_BODY_BYTES), (DEMOS, MAX_BATCH_BYTES), ("/v1/chat/completions", MAX_BODY_BYTES)],
)
def test_a_body_without_a_length_is_counted_as_it_comes(api: TestClient, path: str, limit: int) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(limit // 2**20 + 1):
            yield b" " * 2**20

    reply = api.post(path, content=body(), headers={"content-type": "application/json"})
    refused(reply, 413, param=None, code="content_too_large")


def test_a_nul_in_the_url_is_refused(api: TestClient) -> None:
    refused(api.get("/v1/assistants/a%00b"), 400, param=None, code="bad_request")
    refused(api.get("/v1/assistants?after=%00"), 400, param=None, code="bad_request")


def test_a_failure_tells_nothing_of_its_cause(
    api: TestClient, caplog: pytest.LogCaptureFixture, settings: Settings
) -> None:
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    with context.sessions.begin() as session:
        session.connection().exec_driver_sql("ALTER TABLE assistants RENAME TO gone")
    with caplog.at_level(logging.ERROR, logger="api.edge"):
        reply = api.get("/v1/assistants", headers={"x-request-id": "failing-1"})
    refused(reply, 500, param=None, code="internal_error")
    assert "assistants" not in reply.text
    assert reply.headers["x-request-id"] == "failing-1"
    assert "failing-1" in caplog.text
    assert "no such table" in caplog.text
