"""Shadow traffic: another version is asked as well, and no client can tell."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from domain.settings import Settings
from tests.integration.http.publishing import publish
from tests.integration.http.stack import ASK, CHAT, Stack, contents, running

TRAFFIC = "/v1/assistants/support/traffic"
ALIAS = "/v1/assistants/support/aliases"
SECRET = "the-users-own-words"


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    """v0 is the champion, v1 its shadow."""
    limits = settings.model_copy(
        update={"shadow_requests": 2, "gateway_places_per_assistant": 3, "engine_first_byte_seconds": 4.0}
    )
    with running(limits, base_folder) as one:
        publish(one.context, "support", outcome="hold")
        assert one.client.put(f"{ALIAS}/candidate", json={"version": "v1"}).json()["serving"] is True
        one.engine.requests.clear()
        plan = {"shadow": {"percent": 100, "skill": "taught"}}
        assert one.client.put(TRAFFIC, json=plan).json()["shadow_version"] == "v1"
        yield one


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def figures(stack: Stack, role: str = "shadow") -> dict[str, Any]:
    found = stack.client.get(TRAFFIC).json()["figures"]
    return next(
        (one for one in found if one["role"] == role), dict.fromkeys(("requests", "errors", "dropped"), 0)
    )


def until_asked(stack: Stack, times: int) -> None:
    until(lambda: len(stack.engine.requests) == times)


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
    until(lambda: figures(stack)["requests"] == 3)
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
    until(lambda: figures(stack)["requests"] + figures(stack)["dropped"] > 5)
    time.sleep(1.5)
    found = figures(stack)
    assert 8 <= found["requests"] + found["dropped"] <= 42, "24 are expected of 60, four standard errors"
    assert figures(stack, "champion")["requests"] == 60, "those by alias are not shared out"


def test_a_shadow_that_fails_or_hangs_harms_nobody(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.broken.add(adapter)
    assert [stack.client.post(CHAT, json=ASK).status_code for _ in range(2)] == [200] * 2
    until(lambda: figures(stack)["errors"] == 2)
    stack.engine.broken.clear()
    stack.engine.delays[adapter] = 8.0
    stream = {**ASK, "stream": True}
    before = time.monotonic()
    assert [stack.client.post(CHAT, json=stream).status_code for _ in range(6)] == [200] * 6
    assert time.monotonic() - before < 4, "none waited for a shadow"
    until(lambda: figures(stack)["errors"] == 4)
    assert figures(stack)["dropped"] == 4, "two under way at most"
    assert figures(stack, "champion")["errors"] == 0


def test_shadows_give_way_to_requests_that_wait(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.delays[adapter] = 5.0
    stack.client.post(CHAT, json=ASK)
    until(lambda: adapter in models(stack))
    stack.engine.gate.clear()
    with stack.stream() as one, stack.stream() as two, stack.stream() as three:
        streams = [contents(one), contents(two), contents(three)]
        assert [next(stream)[1] for stream in streams] == ["one"] * 3
        waiting = threading.Thread(target=lambda: stack.client.post(CHAT, json=ASK))
        waiting.start()
        until(lambda: figures(stack)["dropped"] == 1, seconds=4.0)
        stack.engine.gate.set()
        waiting.join(10)


def test_an_engine_that_says_it_is_full_gets_less(stack: Stack) -> None:
    [adapter] = stack.engine.adapters
    stack.engine.full.add(adapter)
    stack.client.post(CHAT, json=ASK)
    until(lambda: figures(stack)["dropped"] == 1)
    assert figures(stack)["errors"] == 0
