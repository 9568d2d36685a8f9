"""A canary: who gets it, what sends it back, and what is known of it then."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from api.app import create_app
from domain.settings import Settings
from tests.integration.http.assertions import refused
from tests.integration.http.publishing import publish
from tests.integration.http.server import served
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, running, until

TRAFFIC = "/v1/assistants/support/traffic"
ALIAS = "/v1/assistants/support/aliases"
QUICK = {"percent": 50, "min_requests": 20, "window_seconds": 60, "cooldown_seconds": 90}


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    """v0 is the champion, v1 answers for `canary`."""
    with running(settings, base_folder) as one:
        publish(one.context, "support", outcome="hold")
        assert one.client.put(f"{ALIAS}/canary", json={"version": "v1"}).json()["serving"] is True
        yield one


def version(client: httpx.Client, **fields: Any) -> str:
    headers = fields.pop("headers", None)
    return client.post(CHAT, json={**ASK, **fields}, headers=headers).headers["x-model-version"]


def adapter(stack: Stack) -> str:
    [name] = stack.engine.adapters
    return name


def rollbacks(stack: Stack) -> list[dict[str, Any]]:
    entries = stack.client.get("/v1/audit_logs?limit=100").json()["data"]
    return [entry for entry in entries if entry["action"] == "canary.rollback"]


def test_the_plan_is_read_set_and_cleared_with_its_revision(stack: Stack) -> None:
    first = stack.client.get(TRAFFIC)
    assert (first.json()["revision"], first.headers["etag"]) == (0, '"0"')
    assert (first.json()["canary"], first.json()["figures"]) == (None, [])
    put = stack.client.put(TRAFFIC, json={"canary": {"percent": 5}}, headers={"If-Match": '"0"'})
    assert (put.status_code, put.headers["etag"]) == (200, '"1"')
    assert put.json()["canary_version"] == "v1"
    assert put.json()["canary"] == {
        "alias": "canary",
        "percent": 5.0,
        "max_error_rate": 0.05,
        "max_latency_ratio": 2.0,
        "min_requests": 50,
        "window_seconds": 300.0,
        "cooldown_seconds": 600.0,
    }
    late = stack.client.put(TRAFFIC, json={}, headers={"If-Match": '"0"'})
    refused(late, 412, param="If-Match", code="revision_mismatch")
    odd = stack.client.delete(TRAFFIC, headers={"If-Match": "zero"})
    refused(odd, 412, param="If-Match", code="revision_mismatch")
    gone = stack.client.delete(TRAFFIC, headers={"If-Match": '"1"'})
    assert (gone.json()["revision"], gone.json()["canary"]) == (2, None)
    assert stack.client.get(TRAFFIC).headers["etag"] == '"2"'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"canary": {}}, "canary.percent"),
        ({"canary": {"percent": 0}}, "canary.percent"),
        ({"canary": {"percent": 100.5}}, "canary.percent"),
        ({"canary": {"percent": 5, "alias": "champion"}}, "canary.alias"),
        ({"canary": {"percent": 5, "alias": "v1"}}, "canary.alias"),
        ({"canary": {"percent": 5, "alias": "nobody"}}, "canary.alias"),
        ({"canary": {"percent": 5, "max_error_rate": 1}}, "canary.max_error_rate"),
        ({"canary": {"percent": 5, "max_latency_ratio": 0.5}}, "canary.max_latency_ratio"),
        ({"canary": {"percent": 5, "min_requests": 0}}, "canary.min_requests"),
        ({"canary": {"percent": 5, "window_seconds": 0}}, "canary.window_seconds"),
        ({"canary": {"percent": 5, "cooldown_seconds": -1}}, "canary.cooldown_seconds"),
        ({"canary": {"percent": 5, "share": 1}}, "canary.share"),
        ({"shadow": {"percent": 5, "alias": "nobody"}}, "shadow.alias"),
        ({"shadow": {"percent": 5, "alias": "canary", "skill": "nothing"}}, "shadow.skill"),
        ({"mirror": {}}, "mirror"),
    ],
)
def test_a_bad_value_names_its_field(one_stack: Stack, body: Any, param: str) -> None:
    refused(one_stack.client.put(TRAFFIC, json=body), 422, param=param, code="invalid_input")


@pytest.fixture(scope="module")
def one_stack(tmp_path_factory: Any, new_sqlite: Any, base_folder: Path) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, cache_dir=home / "cache", database_url=new_sqlite(True))
    with running(settings, base_folder) as stack:
        stack.client.put(f"{ALIAS}/canary", json={"version": "v0"})
        yield stack


def test_an_unknown_assistant_has_no_traffic(one_stack: Stack) -> None:
    for method in ("GET", "PUT", "DELETE"):
        body = {} if method == "PUT" else None
        reply = one_stack.client.request(method, "/v1/assistants/nobody/traffic", json=body)
        refused(reply, 404, param="assistant", code="not_found")


def test_the_same_user_gets_the_same_version_and_more_percent_keeps_who_is_in(stack: Stack) -> None:
    users = [f"u{n}" for n in range(40)]

    def canaries() -> set[str]:
        return {user for user in users if version(stack.client, user=user) == "v1"}

    stack.client.put(TRAFFIC, json={"canary": {"percent": 30}})
    some = canaries()
    assert 3 <= len(some) <= 24, "12 are expected"
    assert canaries() == some
    stack.client.put(TRAFFIC, json={"canary": {"percent": 60}})
    more = canaries()
    assert some < more
    inside, outside = min(some), min(set(users) - more)
    for user, expected in ((inside, "v1"), (outside, "v0")):
        assert version(stack.client, safety_identifier=user) == expected
        assert version(stack.client, headers={"x-ratchet-user": user}) == expected
        assert version(stack.client, model="support@champion", user=user) == "v0"
        assert version(stack.client, model="support@canary", user=user) == "v1"
        assert version(stack.client, model="support@v0", user=user) == "v0"
    assert {version(stack.client) for _ in range(40)} == {"v0", "v1"}, "nobody known: each request for itself"
    stack.client.delete(TRAFFIC)
    assert canaries() == set()


def test_a_user_must_be_a_text(stack: Stack) -> None:
    refused(stack.client.post(CHAT, json={**ASK, "user": 7}), 400, param="user", code="invalid_input")


def test_a_canary_that_fails_is_rolled_back_and_cools_down(stack: Stack) -> None:
    assert stack.client.put(TRAFFIC, json={"canary": QUICK}).status_code == 200
    stack.engine.broken.add(adapter(stack))
    seen: Counter[tuple[int, str]] = Counter()

    def ask() -> bool:
        reply = stack.client.post(CHAT, json=ASK)
        seen[reply.status_code, reply.headers["x-model-version"]] += 1
        return seen[502, "v1"] >= 20

    while not ask():
        assert sum(seen.values()) < 200
    assert {version(stack.client) for _ in range(30)} == {"v0"}, "stopped at once"
    until(lambda: stack.client.get(TRAFFIC).json()["canary"] is None, "the ledger does not know")
    assert seen[502, "v1"] == 20, "no request more than the minimum"
    plan = stack.client.get(TRAFFIC).json()
    assert plan["revision"] == 2
    last = plan["last_rollback"]
    assert (last["rule"], last["canary"]["version"], last["champion"]["version"]) == (
        "error_rate",
        "v1",
        "v0",
    )
    assert (last["canary"]["requests"], last["canary"]["errors"]) == (20, 20)
    assert last["champion"]["errors"] == 0
    [entry] = rollbacks(stack)
    assert (entry["actor"], entry["data"]["canary"]["errors"]) == ("gateway", 20)
    again = stack.client.put(TRAFFIC, json={"canary": QUICK})
    error = refused(again, 409, param="canary", code="canary_cooling_down")
    assert "failed 20 of 20 requests" in error["message"]
    assert 60 < int(again.headers["retry-after"]) <= 90
    metrics = stack.client.get("/metrics").text
    assert 'ratchet_canary_rollbacks_total{assistant="support",rule="error_rate"} 1.0' in metrics
    assert (
        'ratchet_traffic_requests_total{assistant="support",outcome="error",role="canary",version="v1"} 20.0'
        in metrics
    )

    def figures() -> dict[str, Any]:
        return {one["role"]: one for one in stack.client.get(TRAFFIC).json()["figures"]}

    until(lambda: "canary" in figures() and figures()["canary"]["requests"] == 20, "no figures")
    assert (figures()["canary"]["error_rate"], figures()["canary"]["latency_p50"]) == (1.0, None)
    assert (figures()["champion"]["error_rate"], figures()["champion"]["version"]) == (0.0, "v0")
    assert figures()["champion"]["latency_p50"] > 0


def test_a_slow_canary_is_rolled_back(stack: Stack) -> None:
    stack.client.put(TRAFFIC, json={"canary": {**QUICK, "max_latency_ratio": 1.2}})
    # Far slower: on a busy machine the champion's replies vary as well.
    stack.engine.delays[adapter(stack)] = 0.8
    stack.engine.delays["tiny-base"] = 0.01
    until(
        lambda: bool(version(stack.client)) and stack.client.get(TRAFFIC).json()["canary"] is None,
        "the canary stays",
        seconds=2 * PATIENCE,
    )
    last = stack.client.get(TRAFFIC).json()["last_rollback"]
    assert last["rule"] == "latency_p50"
    assert last["canary"]["latency_p50"] > 0.8


def test_what_clients_do_wrong_is_not_the_canarys_fault(stack: Stack) -> None:
    stack.client.put(TRAFFIC, json={"canary": {**QUICK, "percent": 100, "min_requests": 5}})
    stack.engine.refuse = 400, {"error": {"message": "no", "code": 400}}
    for _ in range(20):
        assert stack.client.post(CHAT, json=ASK).status_code == 400
    stack.engine.refuse = None
    time.sleep(1.2)
    assert version(stack.client) == "v1"
    assert stack.client.get(TRAFFIC).json()["canary"] is not None


def test_two_processes_and_a_ledger_that_is_away_roll_back_once(
    settings: Settings, base_folder: Path
) -> None:
    other_app = create_app(settings)
    with (
        running(settings, base_folder) as stack,
        served(other_app) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as other,
    ):
        publish(stack.context, "support", outcome="hold")
        stack.client.put(f"{ALIAS}/canary", json={"version": "v1"})
        stack.client.put(TRAFFIC, json={"canary": {**QUICK, "percent": 100}})
        until(lambda: version(other) == "v1", "the other process does not know the plan")
        stack.engine.broken.add(adapter(stack))
        with stack.context.sessions() as away:
            away.execute(text("SELECT 1"))  # holds the write lock until it is closed
            for client in (stack.client, other):
                until(lambda client=client: version(client) == "v0", "not stopped")  # type: ignore[misc]
                assert {version(client) for _ in range(5)} == {"v0"}
            assert stack.client.get(TRAFFIC).json()["canary"] is not None, "the ledger does not know yet"
        until(lambda: stack.client.get(TRAFFIC).json()["canary"] is None, "the ledger does not know")
        time.sleep(2.5)
        assert len(rollbacks(stack)) == 1
        assert stack.client.get(TRAFFIC).json()["revision"] == 2
        assert {version(client) for client in (stack.client, other) for _ in range(5)} == {"v0"}
