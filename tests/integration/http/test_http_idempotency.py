"""A creating POST that is sent twice happens once."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from api import idempotency
from api.context import Context
from registry.session import SQLITE_BUSY_MS
from tests.integration.http.assertions import refused
from tests.integration.http.conftest import SKILL

DEMOS = "/v1/assistants/support/skills/route/demonstrations"
LINE = {"prompt": "where is my card", "response": "ROUTE: card"}
KEY = {"Idempotency-Key": "order-1"}


def test_every_creating_post_replays(api: TestClient, base_folder: Any) -> None:
    posts: list[tuple[str, dict[str, Any]]] = [
        ("/v1/assistants", {"name": "support", "base_model": str(base_folder)}),
        ("/v1/assistants/support/skills", SKILL),
        (DEMOS, {"demonstrations": [LINE]}),
        ("/v1/assistants/support/updates", {}),
    ]
    for number, (path, body) in enumerate(posts):
        key = {"Idempotency-Key": f"key-{number}"}
        first = api.post(path, json=body, headers=key)
        again = api.post(path, json=body, headers=key)
        assert first.is_success, first.text
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
    assert len(api.get("/v1/assistants").json()["data"]) == 1
    assert len(api.get("/v1/assistants/support/skills").json()["data"]) == 1
    assert len(api.get("/v1/assistants/support/updates").json()["data"]) == 1
    batches = [row for row in api.get("/v1/audit_logs").json()["data"] if row["action"] == "batch.accept"]
    assert len(batches) == 1


@pytest.mark.usefixtures("assistant")
def test_a_key_with_another_request_is_refused(api: TestClient) -> None:
    assert api.post(DEMOS, json={"demonstrations": [LINE]}, headers=KEY).status_code == 201
    other_body = api.post(DEMOS, json={"demonstrations": [{**LINE, "response": "x"}]}, headers=KEY)
    refused(other_body, 422, param="Idempotency-Key", code="idempotency_mismatch")
    other_path = api.post("/v1/assistants/support/updates", json={"demonstrations": [LINE]}, headers=KEY)
    assert other_path.status_code == 422
    assert len(api.get(DEMOS).json()["data"]) == 1
    assert api.get("/v1/assistants/support/updates").json()["data"] == []


@pytest.mark.usefixtures("assistant")
def test_a_refused_request_leaves_its_key_free(api: TestClient) -> None:
    refused(
        api.post("/v1/assistants/support/updates", json={}, headers=KEY),
        409,
        param="skills",
        code="no_new_demonstrations",
    )
    api.post(DEMOS, json={"demonstrations": [LINE]})
    assert api.post("/v1/assistants/support/updates", json={}, headers=KEY).status_code == 202


@pytest.fixture
def held(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(started, go): the first creation stops inside its work until `go` is set."""
    started, go = threading.Event(), threading.Event()
    run = idempotency.Creation.run

    def slow(self: idempotency.Creation, *args: Any, **kwargs: Any) -> Any:
        if not started.is_set():
            started.set()
            assert go.wait(60)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(idempotency.Creation, "run", slow)
    yield started, go
    go.set()


@pytest.mark.usefixtures("assistant")
def test_a_double_of_a_running_request_is_refused(
    api: TestClient, held: tuple[threading.Event, threading.Event]
) -> None:
    started, go = held
    replies: list[Any] = []
    body = {"demonstrations": [LINE]}
    first = threading.Thread(target=lambda: replies.append(api.post(DEMOS, json=body, headers=KEY)))
    first.start()
    assert started.wait(60)
    refused(
        api.post(DEMOS, json=body, headers=KEY), 409, param="Idempotency-Key", code="idempotency_in_flight"
    )
    go.set()
    first.join(60)
    assert replies[0].status_code == 201
    assert api.post(DEMOS, json=body, headers=KEY).content == replies[0].content
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    assert context.idempotency_keys_in_flight == set()


@pytest.mark.usefixtures("assistant")
def test_a_batch_is_replayed_while_somebody_writes(api: TestClient) -> None:
    body = {"demonstrations": [LINE]}
    first = api.post(DEMOS, json=body, headers=KEY)
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    with context.sessions.begin() as writer:
        writer.execute(text("UPDATE teams SET name = 'changed'"))
        started_at = time.monotonic()
        again = api.post(DEMOS, json=body, headers=KEY)
        assert time.monotonic() - started_at < SQLITE_BUSY_MS / 1000 - 5  # a writer would wait for the lock
    assert (again.status_code, again.content) == (201, first.content)
    refused(
        api.post(DEMOS, json={"demonstrations": []}, headers=KEY),
        422,
        param="Idempotency-Key",
        code="idempotency_mismatch",
    )


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize("key", ["", "x" * 256])
def test_an_odd_key_is_refused(api: TestClient, key: str) -> None:
    reply = api.post(DEMOS, json={"demonstrations": [LINE]}, headers={"Idempotency-Key": key})
    refused(reply, 422, param="Idempotency-Key", code="invalid_input")
    assert api.get(DEMOS).json()["data"] == []
