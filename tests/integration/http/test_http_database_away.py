"""What clients see while PostgreSQL's network swallows every packet, and after it: real server, real HTTP."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from domain.settings import Settings
from registry import postgresql
from tests.conftest_databases import NewDatabase
from tests.integration.http.assertions import refused
from tests.integration.http.publishing import publish
from tests.integration.http.stack import ASK, CHAT, Stack, running
from tests.swallowing_proxy import SwallowingProxy, proxied

SILENCE, CONNECT = 0.5, 2
WORST = SILENCE + 3 * CONNECT + 2
"""Seconds: the connection's silence, another one's, that of what should replace it; and of one before it."""
CLIENTS = 60
"""More than the API has threads, and four times the connections of its pool."""


@pytest.fixture
def away(
    tmp_path: Path, new_postgresql: NewDatabase, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stack, SwallowingProxy]]:
    monkeypatch.setattr(postgresql, "SILENCE_SECONDS", SILENCE)
    monkeypatch.setattr(postgresql, "CONNECT_SECONDS", CONNECT)
    monkeypatch.setitem(postgresql.LIMITS, "connect_timeout", CONNECT)
    with proxied(new_postgresql(True)) as (url, proxy):
        settings = Settings(home=tmp_path, cache_dir=tmp_path / "cache", database_url=url)
        with running(settings, base_folder) as stack:
            publish(stack.context, "support", outcome="hold")
            proxy.swallow()
            try:
                yield stack, proxy
            finally:
                proxy.forward()


def timed(ask, *arguments, **fields) -> tuple[httpx.Response, float]:  # type: ignore[no-untyped-def]
    began = time.monotonic()
    reply = ask(*arguments, **fields)
    return reply, time.monotonic() - began


def test_every_request_ends_in_time_and_the_same_process_recovers(
    away: tuple[Stack, SwallowingProxy],
) -> None:
    stack, proxy = away
    read, seconds = timed(stack.client.get, "/v1/assistants/support")
    refused(read, 503, param=None, code="database_unavailable")
    assert read.headers["retry-after"] == "1"
    assert seconds < WORST
    skill = {"name": "s", "grader": {"type": "exact"}}
    written, seconds = timed(stack.client.post, "/v1/assistants/support/skills", json=skill)
    refused(written, 503, param=None, code="database_unavailable")
    assert seconds < WORST
    page, seconds = timed(stack.client.get, "/dashboard")
    assert (page.status_code, "does not answer" in page.text) == (503, True)
    ready, seconds = timed(stack.client.get, "/readyz")
    assert (ready.status_code, ready.json()["checks"]["database"]["ok"]) == (503, False)
    assert seconds < WORST
    # A version that would have to be loaded first is known to the database alone.
    loaded, seconds = timed(stack.client.post, CHAT, json={**ASK, "model": "support@v1"})
    refused(loaded, 503, param=None, code="engine_unavailable")
    assert seconds < WORST
    answered, seconds = timed(stack.client.post, CHAT, json=ASK)
    assert (answered.headers["x-model-version"], seconds < 2) == ("v0", True)
    proxy.forward()
    deadline = time.monotonic() + 2 * postgresql.AGAIN_SECONDS
    while (read := stack.client.get("/v1/assistants/support")).status_code != 200:
        assert time.monotonic() < deadline
    assert read.json()["champion"] == "v0"
    assert stack.client.post("/v1/assistants/support/skills", json=skill).status_code == 201
    assert stack.client.post(CHAT, json={**ASK, "model": "support@v1"}).status_code == 200


def test_many_requests_do_not_wait_for_each_others_timeouts(away: tuple[Stack, SwallowingProxy]) -> None:
    stack, _ = away
    with httpx.Client(base_url=stack.url, timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(timed, client.get, "/v1/assistants/support") for _ in range(CLIENTS)]
        time.sleep(1)
        alive, seconds = timed(stack.client.get, "/healthz")
        assert (alive.status_code, seconds < 1) == (200, True)
        answered, seconds = timed(stack.client.post, CHAT, json=ASK)
        assert (answered.status_code, seconds < 2) == (200, True)
        ended = [one.result() for one in asked]
    assert {reply.status_code for reply, _ in ended} == {503}
    assert max(seconds for _, seconds in ended) < WORST
