"""Shadow traffic: another version is asked as well, and no client can tell."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from domain.settings import Settings
from tests.integration.http.publishing import publish
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, contents, running, until

TRAFFIC = "/v1/assistants/support/traffic"
ALIAS = "/v1/assistants/support/aliases"
SECRET = "the-users-own-words"
NEVER = 10 * PATIENCE
"""Seconds."""


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    """v0 is the champion, v1 its shadow."""
    limits = settings.model_copy(update={"shadow_requests": 2, "gateway_places_per_assistant": 3})
    with running(limits, base_folder) as one:
        publish(one.context, "support", outcome="hold")
        assert one.client.put(f"{ALIAS}/candidate", json={"version": "v1"}).json()["serving"] is True
        one.engine.requests.clear()
        plan = {"shadow": {"percent": 100, "skill": "taught"}}
        assert one.client.put(TRAFFIC, json=plan).json()["shadow_version"] == "v1"
        yield one


def figures(stack: Stack, role: str = "shadow") -> dict[str, Any]:
    found = stack.client.get(TRAFFIC).json()["figures"]
    return next(
        (one for one in found if one["role"] == role), dict.fromkeys(("requests", "errors", "dropped"), 0)
    )


def told(stack: Stack, role: str) -> float:
    """Requests by the metrics, which are not behind like the figures in the ledger."""
    lines = stack.client.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("ratchet_traffic_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in counted if f'role="{role}"' in line)


def until_asked(stack: Stack, times: int) -> None:
    until(lambda: len(stack.engine.requests) == times, "the shadow is not asked")


def models(stack: Stack) -> list[str]:
    return [request["model"] for request in stack.engine.requests]


@pytest.mark.parametrize("stream", [False, True])
def test_the_shadow_is_asked_the_same_and_compared(stack: Stack, stream: bool) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    ask = {**ASK, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, **fields}
    [adapter] = stack.engine.adapters
    for sent in (1, 2, 3):
        reply = stack.client.post(CHAT, json=ask)
        assert reply.headers["x-model-version"] == "v0"
        assert adapter not in reply.text
        until_asked(stack, 2 * sent)
    until(lambda: figures(stack)["requests"] == 3, "not compared")
    assert sorted(models(stack)) == sorted(["tiny-base", adapter] * 3)
    mirrored = next(request for request in stack.engine.requests if request["model"] == adapter)
    assert mirrored == {**{k: v for k, v in ask.items() if k != "user"}, "model": adapter}
    found = figures(stack)
    assert (found["version"], found["errors"], found["compared"]) == ("v1", 0, 3)
    # "onetwo\u2028tiny-baseé" against "onetwo\u2028support-v1-...é": the champion names another model
    assert (found["identical"], found["agreement"]) == (0.0, 0.0)
    assert 0 < found["rouge_l"] < 1
    assert found["latency_p50"] > 0
    assert figures(stack, "champion")["requests"] == 3
    with stack.context.reads() as session:
        stored = session.execute(text("SELECT * FROM traffic_figures")).all()
        assert SECRET not in str(stored)
        assert SECRET not in str(session.execute(text("SELECT * FROM audit_logs")).all())


def test_a_part_of_the_requests_and_none_but_the_champions(stack: Stack) -> None:
    stack.client.put(TRAFFIC, json={"shadow": {"percent": 40}})
    for _ in range(60):
        stack.client.post(CHAT, json=ASK)
        stack.client.post(CHAT, json={**ASK, "model": "support@champion"})
    stack.await_no_leases()  # no shadow is asked any more
    expected = told(stack, "shadow")
    assert 8 <= expected <= 42, "24 are expected of 60, four standard errors"
    assert told(stack, "champion") == 60, "those by alias are not shared out"
    until(
        lambda: (
            figures(stack)["requests"] + figures(stack)["dropped"] == expected
            and figures(stack, "champion")["requests"] == 60
        ),
        "the figures are not written down",
    )


def test_a_shadow_that_fails_or_hangs_harms_nobody(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.broken.add(adapter)
    assert [stack.client.post(CHAT, json=ASK).status_code for _ in range(2)] == [200] * 2
    until(lambda: figures(stack)["errors"] == 2, "no errors are counted")
    stack.engine.broken.clear()
    stack.engine.delays[adapter] = NEVER
    stream = {**ASK, "stream": True}
    assert [stack.client.post(CHAT, json=stream).status_code for _ in range(6)] == [200] * 6
    until(lambda: figures(stack)["dropped"] == 4, "two under way at most")
    assert told(stack, "shadow") == 2 + 4, "none waited for a shadow: both are still under way"
    assert figures(stack, "champion")["errors"] == 0


def test_a_shadow_that_hangs_is_given_up(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.delays[adapter] = NEVER
    shadows = stack.context.shadows
    shadows._patience = replace(shadows._patience, reply=0.5)  # the champion's stays
    assert stack.client.post(CHAT, json=ASK).status_code == 200
    until(lambda: figures(stack)["errors"] == 1, "it is waited for")
    assert figures(stack, "champion")["errors"] == 0


def test_shadows_give_way_to_requests_that_wait(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.delays[adapter] = NEVER
    stack.client.post(CHAT, json=ASK)
    until(lambda: adapter in models(stack), "the shadow is not asked")
    stack.engine.gate.clear()
    with stack.stream() as one, stack.stream() as two, stack.stream() as three:
        streams = [contents(one), contents(two), contents(three)]
        assert [next(stream)[1] for stream in streams] == ["one"] * 3
        waiting = threading.Thread(target=lambda: stack.client.post(CHAT, json=ASK))
        waiting.start()
        until(lambda: figures(stack)["dropped"] == 1, "the shadow did not give way")
        stack.engine.gate.set()
        waiting.join(PATIENCE)


def test_an_engine_that_says_it_is_full_gets_less(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.full.add(adapter)
    stack.client.post(CHAT, json=ASK)
    until(lambda: figures(stack)["dropped"] == 1, "not dropped")
    assert figures(stack)["errors"] == 0
