"""What clients see while versions change: publish, promotion, rollback, loading on demand, lost adapters."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from domain.settings import Settings
from registry import serving
from tests.integration.http.assertions import refused
from tests.integration.http.publishing import publish
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, answer, contents, running, until


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    with running(settings, base_folder) as one:
        yield one


def test_a_swap_leaves_running_requests_where_they_started(stack: Stack) -> None:
    stack.engine.gate.clear()
    with stack.stream() as old:
        chunks = contents(old)
        assert next(chunks) == ("support", "one")
        assert publish(stack.context, "support") == 1
        stack.await_version(1)
        stack.engine.gate.set()
        new = stack.client.post(CHAT, json=ASK)
        assert new.headers["x-model-version"] == "v1"
        [adapter] = stack.engine.adapters
        assert new.json()["choices"][0]["message"]["content"] == answer(adapter)
        assert [text for _, text in chunks][1] == "tiny-base"
        assert old.headers["x-model-version"] == "v0"


def test_a_rollback_replies_when_the_earlier_version_answers(stack: Stack) -> None:
    publish(stack.context, "support")
    stack.await_version(1)
    reply = stack.client.post("/v1/assistants/support/rollback", json={"reason": "worse"})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    expected = {"alias": "champion", "from_version": "v1", "to_version": "v0", "revision": 3, "serving": True}
    assert {name: body[name] for name in expected} == expected
    assert stack.client.post(CHAT, json=ASK).headers["x-model-version"] == "v0"
    again = stack.client.post("/v1/assistants/support/rollback")
    refused(again, 409, param=None, code="nothing_to_roll_back_to")
    history = stack.client.get("/v1/assistants/support/aliases/champion/history").json()["data"]
    moves = [(move["kind"], move["from_version"], move["to_version"], move["reason"]) for move in history]
    assert moves[0] == ("rollback", "v1", "v0", "worse")
    assert [move[0] for move in moves] == ["rollback", "publish", "create"]


def test_a_rollback_sent_twice_happens_once(stack: Stack) -> None:
    publish(stack.context, "support")
    publish(stack.context, "support")
    stack.await_version(2)
    key = {"Idempotency-Key": "back-1"}
    first = stack.client.post("/v1/assistants/support/rollback", headers=key)
    again = stack.client.post("/v1/assistants/support/rollback", headers=key)
    assert (first.json()["to_version"], first.json()["serving"]) == ("v1", True)
    assert again.json() == first.json()
    assert stack.client.get("/v1/assistants/support").json()["champion"] == "v1"


def test_promotion_and_its_guard(stack: Stack) -> None:
    champion = "/v1/assistants/support/aliases/champion"
    publish(stack.context, "support", outcome="block")
    publish(stack.context, "support", outcome="hold")
    assert stack.client.get("/v1/assistants/support").json()["champion"] == "v0"
    refused(stack.client.put(champion, json={"version": "v1"}), 409, param="version", code="version_blocked")
    held = stack.client.put(champion, json={"version": "v2"})
    assert (held.json()["to_version"], held.json()["serving"]) == ("v2", True)
    forced = stack.client.put(champion, json={"version": "v1", "override": True, "reason": "known"})
    assert (forced.json()["to_version"], forced.json()["serving"]) == ("v1", True)
    assert stack.client.post(CHAT, json=ASK).headers["x-model-version"] == "v1"


def test_damaged_files_never_serve(stack: Stack) -> None:
    publish(stack.context, "support", outcome="hold")
    with stack.context.sessions() as session:
        wanted = serving.wanted_version(session, "team_default", "support", 1)
    weights = stack.context.store.path(wanted.version_id) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    reply = stack.client.put("/v1/assistants/support/aliases/champion", json={"version": "v1"})
    refused(reply, 409, param="adapter_model.safetensors", code="corrupt_artifact")
    assert stack.client.get("/v1/assistants/support").json()["champion"] == "v0"
    chat = stack.client.post(CHAT, json={**ASK, "model": "support@v1"})
    refused(chat, 409, param="adapter_model.safetensors", code="corrupt_artifact")


def test_a_version_without_an_alias_is_loaded_on_demand(stack: Stack) -> None:
    publish(stack.context, "support", outcome="hold")
    assert stack.engine.adapters == set()
    reply = stack.client.post(CHAT, json={**ASK, "model": "support@v1"})
    assert (reply.headers["x-model-version"], reply.json()["model"]) == ("v1", "support@v1")
    [adapter] = stack.engine.adapters
    assert reply.json()["choices"][0]["message"]["content"] == answer(adapter)


def test_loads_that_wait_for_an_engine_keep_nothing_else_waiting(stack: Stack) -> None:
    """More of them than there are threads for the other routes, of which there are 40."""
    publish(stack.context, "support", outcome="hold")
    [replica] = stack.context.controller._fleet.replicas.values()
    ask = {**ASK, "model": "support@v1"}
    with httpx.Client(base_url=stack.url, timeout=60) as client, ThreadPoolExecutor(48) as pool:
        with replica.lock:  # a load is under way
            asking = [pool.submit(client.post, CHAT, json=ask) for _ in range(48)]
            until(lambda: stack.context.admission.under_way == 48, "they do not come in")
            assert stack.client.get("/healthz", timeout=20).status_code == 200
            assert stack.client.get("/v1/assistants/support", timeout=20).json()["champion"] == "v0"
        replies = [one.result() for one in asking]
    assert {(reply.status_code, reply.headers["x-model-version"]) for reply in replies} == {(200, "v1")}


def test_an_engine_that_lost_its_adapters_gets_them_back(stack: Stack) -> None:
    publish(stack.context, "support")
    stack.await_version(1)
    stack.engine.adapters.clear()  # what a restart does; the controller may not have noticed yet
    reply = stack.client.post(CHAT, json=ASK)
    assert (reply.status_code, reply.headers["x-model-version"]) == (200, "v1")


def test_without_the_database_what_serves_answers_and_the_rest_is_503(stack: Stack) -> None:
    publish(stack.context, "support", outcome="hold")
    database = stack.context.reads.kw["bind"]

    def away(_: Connection) -> None:
        raise OperationalError("BEGIN", {}, ConnectionError("the database is away"))

    event.listen(database, "begin", away)
    try:
        assert stack.client.post(CHAT, json=ASK).headers["x-model-version"] == "v0"
        reply = stack.client.post(CHAT, json={**ASK, "model": "support@v1"})
        refused(reply, 503, param=None, code="engine_unavailable")
        assert reply.headers["retry-after"] == "1"
    finally:
        event.remove(database, "begin", away)
    assert stack.client.post(CHAT, json={**ASK, "model": "support@v1"}).status_code == 200


def test_no_request_fails_or_mixes_versions_while_versions_change(stack: Stack) -> None:
    publish(stack.context, "support")
    stack.await_version(1)
    names = {"v0": "tiny-base"} | {f"v{name.split('-v')[1][0]}": name for name in stack.engine.adapters}
    replies: list[httpx.Response] = []
    stop = threading.Event()

    def chat() -> None:
        with httpx.Client(base_url=stack.url, timeout=PATIENCE) as client:
            while not stop.is_set():
                replies.append(client.post(CHAT, json=ASK))

    def await_reply_of(version: str) -> None:
        before = len(replies)
        until(
            lambda: version in [reply.headers.get("x-model-version") for reply in replies[before:]],
            f"nobody was answered by {version}",
        )

    threads = [threading.Thread(target=chat) for _ in range(3)]
    for thread in threads:
        thread.start()
    champion = "/v1/assistants/support/aliases/champion"
    for version in ("v0", "v1", "v0", "v1"):
        moved = stack.client.put(champion, json={"version": version})
        assert moved.json()["serving"] is True
        assert stack.client.post(CHAT, json=ASK).headers["x-model-version"] == version
        await_reply_of(version)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert {reply.status_code for reply in replies} == {200}
    assert {reply.headers["x-model-version"] for reply in replies} == {"v0", "v1"}
    for reply in replies:
        told = reply.json()["choices"][0]["message"]["content"]
        assert told == answer(names[reply.headers["x-model-version"]])
