"""Every route that changes something writes its audit entry in the transaction of the change."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import MetaData, text

from api.context import Context
from api.dashboard import router as dashboard
from api.outbox_sender import OutboxSender
from registry import audit
from tests.integration.http.conftest import SKILL
from tests.integration.http.publishing import publish

A = "/v1/assistants/{assistant}"
DEMOS = f"{A}/skills/{{skill}}/demonstrations"
JOBS = "/v1/fine_tuning/jobs"
CHANGING_NOTHING = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
}
"""They read, and speak with the engine."""
FILE = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    b'{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n'
)
NAMES = {"update": "update", "webhook": "webhook", "file": "file", "fine_tuning.job": "job"}
"""`object` of a reply -> the place in later routes that its id takes."""
Request = tuple[str, str, dict[str, Any], str]
"""(method, route, body, audit action)"""
PLACES = {"assistant": "support", "skill": "route", "alias": "canary", "version": "v1"}


def requests(base_model: str) -> list[Request]:
    """One of every mutating route, in an order in which each finds what it needs."""
    line = {"prompt": "p", "response": "r"}
    return [
        ("POST", "/v1/assistants", {"name": "support", "base_model": base_model}, "assistant.create"),
        ("PATCH", A, {"description": "first line"}, "assistant.update"),
        ("POST", f"{A}/skills", SKILL, "skill.create"),
        ("PATCH", f"{A}/skills/{{skill}}", {"description": "where to"}, "skill.update"),
        ("POST", DEMOS, {"demonstrations": [line]}, "batch.accept"),
        ("POST", f"{A}/updates", {}, "update.create"),
        ("POST", "/v1/updates/{update}/pause", {}, "update.pause"),
        ("POST", "/v1/updates/{update}/resume", {}, "update.resume"),
        ("POST", "/v1/updates/{update}/cancel", {}, "update.cancel"),
        ("PUT", f"{A}/aliases/{{alias}}", {"version": "v0"}, "alias.move"),
        ("PUT", f"{A}/traffic", {"canary": {"percent": 5}}, "traffic.set"),
        ("DELETE", f"{A}/traffic", {}, "traffic.clear"),
        ("POST", f"{A}/rollback", {"reason": "worse"}, "alias.move"),
        ("PATCH", f"{A}/versions/{{version}}", {"pinned": True}, "version.pin"),
        ("POST", "/v1/webhooks", {"url": "https://8.8.8.8/hook"}, "webhook.create"),
        ("POST", "/v1/webhooks/{webhook}/test", {}, "webhook.test"),
        ("DELETE", "/v1/webhooks/{webhook}", {}, "webhook.delete"),
        ("POST", "/v1/files", {}, "file.create"),
        ("POST", JOBS, {"model": "support", "training_file": ""}, "fine_tuning_job.create"),
        ("POST", f"{JOBS}/{{job}}/pause", {}, "update.pause"),
        ("POST", f"{JOBS}/{{job}}/resume", {}, "update.resume"),
        ("POST", f"{JOBS}/{{job}}/cancel", {}, "update.cancel"),
        ("DELETE", "/v1/files/{file}", {}, "file.delete"),
    ]


@pytest.fixture(autouse=True)
def no_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the outbox delivers in the meantime is no mutation of a request, and the receiver below is not
    ours to call."""

    async def wait(self: OutboxSender) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(OutboxSender, "run", wait)


@pytest.fixture
def send(api: TestClient, base_folder: Any) -> Callable[[Request], Any]:
    """Sends a request to its route with the ids that earlier replies gave."""
    known = dict(PLACES)

    def do(request: Request) -> Any:
        method, route, body, _ = request
        path = route.format(**known)
        if path == "/v1/files":
            reply = api.post(path, data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", FILE)})
        else:
            if "training_file" in body:
                body = {**body, "training_file": known["file"]}
            reply = api.request(method, path, json=body)
        if reply.is_success:
            kind = NAMES.get(reply.json().get("object"))
            if kind is not None:
                known[kind] = reply.json()["id"]
        return reply

    return do


def mutating_routes(api: TestClient) -> set[tuple[str, str]]:
    paths: dict[str, Any] = api.get("/openapi.json").json()["paths"]
    return {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if method not in ("get", "head", "options")
    }


def test_the_list_below_is_whole(api: TestClient, base_folder: Any) -> None:
    tried = {(method, route) for method, route, _, _ in requests(str(base_folder))}
    assert mutating_routes(api) - CHANGING_NOTHING == tried
    forms = [route.path for route in dashboard.routes if "POST" in route.methods]
    assert forms == ["/dashboard/assistants/{name}/rollback"], "tested with the dashboard"


def test_every_mutation_writes_its_entry(
    api: TestClient, base_folder: Any, send: Callable[[Request], Any]
) -> None:
    for request in requests(str(base_folder)):
        if request[1].endswith("/rollback"):
            publish(context_of(api), "support")  # something to come back from
        before = audit_actions(api)
        reply = send(request)
        assert reply.is_success, (request, reply.text)
        written = audit_actions(api)[len(before) :]
        assert request[3] in written, request
        assert api.get("/v1/audit_logs?limit=100").json()["data"][-1]["actor"] == "user"


def test_a_mutation_whose_entry_cannot_be_written_does_not_happen(
    api: TestClient, base_folder: Any, send: Callable[[Request], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry and change stand in one transaction: with no entry there is no change, in any table."""
    context = context_of(api)
    context.controller.__exit__(None, None, None)  # its notes on serving are no mutation

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the log is full")

    for request in requests(str(base_folder)):
        if request[1].endswith("/rollback"):
            publish(context, "support")  # something to come back from
        before = stored(context)
        with monkeypatch.context() as patched:
            patched.setattr(audit, "record", refuse)
            reply = send(request)
        assert reply.status_code == 500, (request, reply.text)
        assert stored(context) == before, request
        assert send(request).is_success, request


def context_of(api: TestClient) -> Context:
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    return context


def audit_actions(api: TestClient) -> list[str]:
    return [row["action"] for row in api.get("/v1/audit_logs?limit=100").json()["data"]]


def stored(context: Context) -> dict[str, list[str]]:
    with context.reads() as session:
        metadata = MetaData()
        metadata.reflect(session.connection())
        return {
            name: sorted(map(repr, session.execute(text(f"SELECT * FROM {name}")).all()))
            for name in metadata.tables
        }
