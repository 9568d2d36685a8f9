"""Events of an update: as a list and as a live stream."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from domain.update import Phase, Status
from registry import events, updates
from registry.claims import Claim
from tests.integration.http.assertions import refused
from tests.integration.http.server import served

DEMOS = "/v1/assistants/support/skills/route/demonstrations"
STREAM = {"accept": "text/event-stream"}


@pytest.fixture
def update(api: TestClient, assistant: dict[str, Any]) -> str:
    api.post(DEMOS, json={"demonstrations": [{"prompt": "p", "response": "r"}]})
    created: str = api.post("/v1/assistants/support/updates", json={}).json()["id"]
    return created


class Worker:
    """What a worker writes about one update."""

    def __init__(self, api: TestClient, update_id: str) -> None:
        context: Context = api.app.state.context  # type: ignore[attr-defined]
        self.sessions = context.sessions
        with self.sessions.begin() as session:
            claim = updates.claim(session, update_id, worker="test", lease_seconds=60)
        assert claim is not None
        self.claim: Claim = claim

    def step(self, number: int) -> None:
        with self.sessions.begin() as session:
            events.add_event(
                session,
                self.claim.update_id,
                type="metrics",
                message=f"Step {number}\nof 9.",
                data={"step": number},
                claim=self.claim,
            )

    def finish(self) -> None:
        with self.sessions.begin() as session:
            updates.set_phase(session, self.claim, Phase.SERVING)
            updates.finish(session, self.claim, Status.SUCCEEDED)


def read_stream(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Fields of each event; comments are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line == "":
            if fields:
                yield fields
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


def test_events_are_listed_in_order(api: TestClient, update: str) -> None:
    worker = Worker(api, update)
    worker.step(1)
    page = api.get(f"/v1/updates/{update}/events?limit=2").json()
    assert [event["seq"] for event in page["data"]] == [1, 2]
    assert page["has_more"] is True
    assert [event["message"] for event in page["data"]] == ["Queued: 1 demonstrations of route.", "Started."]
    assert page["data"][0]["id"].startswith("evt_")
    for after in (page["last_id"], "2"):
        rest = api.get(f"/v1/updates/{update}/events?after={after}").json()
        assert [(event["seq"], event["type"], event["data"]) for event in rest["data"]] == [
            (3, "metrics", {"step": 1})
        ]
        assert rest["has_more"] is False
    for after in ("evt_x", "-1", "٣"):
        refused(
            api.get(f"/v1/updates/{update}/events", params={"after": after}),
            422,
            param="after",
            code="invalid_input",
        )


def test_a_stream_follows_until_the_update_has_ended(
    api: TestClient, settings: Settings, update: str
) -> None:
    worker = Worker(api, update)
    with served(create_app(settings)) as url, httpx.Client(timeout=60) as client:
        with client.stream("GET", f"{url}/v1/updates/{update}/events", headers=STREAM) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            found = read_stream(reply.iter_lines())
            assert [next(found)["id"], next(found)["id"]] == ["1", "2"]
            worker.step(1)  # while the client is listening
            live = next(found)
            assert live["id"] == "3"
            assert json.loads(live["data"])["message"] == "Step 1\nof 9."
            worker.finish()
            rest = list(found)  # ends by itself
        assert [event.get("id") for event in rest] == ["4", "5", None]
        assert rest[-1]["event"] == "done"
        assert json.loads(rest[-1]["data"])["status"] == "succeeded"

        resumed = {**STREAM, "Last-Event-ID": "3"}
        with client.stream("GET", f"{url}/v1/updates/{update}/events", headers=resumed) as reply:
            ids = [event.get("id") for event in read_stream(reply.iter_lines())]
        assert ids == ["4", "5", None]

        ended = client.get(f"{url}/v1/updates/{update}/events", headers={**STREAM, "Last-Event-ID": "5"})
        assert (ended.status_code, ended.content) == (204, b"")


def test_a_quiet_stream_is_kept_alive(
    api: TestClient, settings: Settings, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.events.KEEPALIVE_SECONDS", 0.0)
    with (
        served(create_app(settings)) as url,
        httpx.stream("GET", f"{url}/v1/updates/{update}/events?after=1", headers=STREAM, timeout=60) as reply,
    ):
        assert next(reply.iter_lines()) == ": ping"


def test_a_stream_of_an_unknown_update_is_an_error_not_a_stream(api: TestClient) -> None:
    refused(api.get("/v1/updates/upd_1/events", headers=STREAM), 404, param="update", code="not_found")
