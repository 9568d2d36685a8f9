"""Pinned versions, and what clients are told of files that are gone or damaged."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, update

from api.app import create_app
from domain.settings import Settings
from registry import serving
from registry.tables import Version
from tests.integration.http.assertions import refused
from tests.integration.http.publishing import add_version, publish
from tests.integration.http.server import served
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, running

VERSIONS = "/v1/assistants/support/versions"


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    with running(settings, base_folder) as one:
        yield one


def test_a_version_is_pinned_and_unpinned(stack: Stack) -> None:
    publish(stack.context, "support")
    for pinned in (True, False):
        reply = stack.client.patch(f"{VERSIONS}/v1", json={"pinned": pinned})
        assert (reply.status_code, reply.json()["pinned"]) == (200, pinned)
        assert stack.client.get(f"{VERSIONS}/v1").json()["pinned"] is pinned
    refused(
        stack.client.patch(f"{VERSIONS}/v9", json={"pinned": True}), 404, param="version", code="not_found"
    )


def test_a_version_without_files_is_refused_by_name(stack: Stack) -> None:
    publish(stack.context, "support")
    publish(stack.context, "support")
    stack.await_version(2)
    with stack.context.sessions.begin() as session:
        session.execute(update(Version).where(Version.number == 1).values(pruned_at=1.0))
    shown = {one["version"]: one["pruned"] for one in stack.client.get(VERSIONS).json()["data"]}
    assert shown == {"v0": False, "v1": True, "v2": False}
    gone = {"param": "version", "code": "version_pruned"}
    refused(stack.client.put("/v1/assistants/support/aliases/canary", json={"version": "v1"}), 409, **gone)
    refused(stack.client.post("/v1/assistants/support/rollback", json={"to": "v1"}), 409, **gone)
    refused(stack.client.patch(f"{VERSIONS}/v1", json={"pinned": True}), 409, **gone)
    # What serves is not disturbed.
    assert stack.client.post(CHAT, json=ASK).headers["x-model-version"] == "v2"


def test_a_damaged_champion_after_a_restart_answers_while_an_engine_holds_it(
    stack: Stack, settings: Settings
) -> None:
    """An engine keeps what it loaded from whole files; once it lost that, damaged files are never loaded."""
    publish(stack.context, "support")
    stack.await_version(1)
    with stack.context.reads() as session:
        [version_id] = session.scalars(select(Version.id).where(Version.number == 1))
    weights = settings.artifacts_dir / version_id / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with served(create_app(settings)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as restarted:
        assert restarted.post(CHAT, json=ASK).headers["x-model-version"] == "v1"
    stack.engine.adapters.clear()
    with served(create_app(settings)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as restarted:
        reply = restarted.post(CHAT, json=ASK)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "corrupt_artifact")
        assert "adapter_model.safetensors" in reply.json()["error"]["message"]
        back = restarted.post("/v1/assistants/support/rollback", json={"to": "v0"})
        assert back.status_code == 200, back.text
        assert restarted.post(CHAT, json=ASK).headers["x-model-version"] == "v0"


def test_an_alias_moves_only_where_the_full_version_below_is_whole(
    stack: Stack, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.rollback.SERVING_SECONDS", 0.0)  # the engine has no such model
    context = stack.context
    add_version(context.sessions, context.store, settings.work_dir, "support", kind="full")
    for _ in range(2):
        add_version(context.sessions, context.store, settings.work_dir, "support")
    with context.reads() as session:
        [full] = session.scalars(select(Version).where(Version.number == 1))
    weights = settings.artifacts_dir / full.id / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    corrupt = {"param": "adapter_model.safetensors", "code": "corrupt_artifact"}
    canary = "/v1/assistants/support/aliases/canary"
    assert full.id in refused(stack.client.put(canary, json={"version": "v2"}), 409, **corrupt)["message"]
    refused(stack.client.post("/v1/assistants/support/rollback", json={"to": "v2"}), 409, **corrupt)
    assert stack.client.get(canary).status_code == 404
    assert stack.client.get("/v1/assistants/support").json()["champion"] == "v3"

    # An engine that runs it compared it when it started, and keeps what it read.
    with context.sessions.begin() as session:
        [engine] = serving.replicas(session)
        serving.register_replica(session, engine.url, full.id, "whole")
    assert stack.client.put(canary, json={"version": "v2"}).status_code == 200
