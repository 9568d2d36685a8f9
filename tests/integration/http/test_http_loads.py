"""Versions that are loaded on demand by an engine that takes its time."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from domain.settings import Settings
from registry import serving
from tests.integration.http.assertions import refused
from tests.integration.http.engine import Engine
from tests.integration.http.publishing import publish
from tests.integration.http.server import served
from tests.integration.http.stack import ASK, CHAT, Stack, running

PATIENCE = 1.0
REQUESTS = 24


@pytest.fixture
def stack(settings: Settings, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setattr("api.loads.PATIENCE_SECONDS", PATIENCE)
    monkeypatch.setattr("api.loads.LOADS_PER_ENGINE", 1)
    with running(settings, base_folder) as one:
        publish(one.context, "support", outcome="hold")
        one.engine.loading.clear()
        try:
            yield one
        finally:
            one.engine.loading.set()


def ask(client: httpx.Client, model: str) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    reply = client.post(CHAT, json={**ASK, "model": model})
    return reply, time.monotonic() - began


def test_a_load_that_lasts_is_waited_for_so_long_and_goes_on(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=60) as client, ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(ask, client, "support@v1") for _ in range(REQUESTS)]
        replies = [one.result() for one in asked]
        for reply, seconds in replies:
            refused(reply, 503, param=None, code="engine_unavailable")
            assert reply.headers["retry-after"] == "5"
            assert PATIENCE <= seconds < PATIENCE + 3
        assert stack.context.admission.under_way == 0
        stack.engine.loading.set()
        asked = [pool.submit(ask, client, "support@v1") for _ in range(REQUESTS)]
        assert {one.result()[0].headers["x-model-version"] for one in asked} == {"v1"}
    assert stack.engine.loads == 1


def test_a_slow_engine_keeps_no_other_from_loading(stack: Stack, base_folder: Path, tmp_path: Path) -> None:
    publish(stack.context, "support", outcome="hold")
    shutil.copytree(base_folder, tmp_path / "other-base")
    base = str(tmp_path / "other-base")
    engine = Engine("other-base")
    with (
        served(engine.app) as url,
        httpx.Client(base_url=stack.url, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        with stack.context.sessions.begin() as session:
            serving.register_replica(session, url, base, "other-base")
        assert client.post("/v1/assistants", json={"name": "other", "base_model": base}).status_code == 201
        publish(stack.context, "other", outcome="hold")
        slow = [pool.submit(ask, client, f"support@v{number}") for number in (1, 2)]
        time.sleep(PATIENCE / 4)
        reply, seconds = ask(client, "other@v1")
        assert (reply.status_code, reply.headers["x-model-version"]) == (200, "v1")
        assert seconds < PATIENCE
        assert {one.result()[0].status_code for one in slow} == {503}
