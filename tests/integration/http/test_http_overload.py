"""More requests than fit, engines that are slow or refuse, and engines that stand in for each other."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from domain.settings import Settings
from tests.integration.http.assertions import refused
from tests.integration.http.engine import Engine
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, contents, running, until

PLACES = {"gateway_places": 3, "gateway_places_per_assistant": 2, "gateway_queue": 1}


@pytest.fixture
def stack(request: pytest.FixtureRequest, settings: Settings, base_folder: Path) -> Iterator[Stack]:
    """With the test's own limits beside PLACES. Each has a limit for what it is about and for nothing else:
    a busy machine must not reach the others."""
    limits = {**PLACES, **getattr(request, "param", {})}
    with running(settings.model_copy(update=limits), base_folder) as one:
        yield one


def limits(**given: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stack", [given], indirect=True, ids=[""])


@limits(gateway_queue_seconds=0.3)
def test_what_finds_no_place_in_time_is_429(stack: Stack) -> None:
    stack.engine.gate.clear()
    with stack.stream() as first, stack.stream() as second:
        assert (first.status_code, second.status_code) == (200, 200)
        reply = stack.client.post(CHAT, json=ASK)
        error = refused(reply, 429, param=None, code="overloaded")
        assert "0.3 s" in error["message"]
        assert reply.headers["retry-after"] == "1"
        assert len(stack.engine.requests) == 2, "the engine heard nothing of it"
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**ASK)
            assert caught.value.code == "overloaded"
        metrics = stack.client.get("/metrics").text
        assert 'ratchet_gateway_requests_total{assistant="support",status="429",version=""} 2.0' in metrics
        assert "ratchet_gateway_requests_under_way 2.0" in metrics
        stack.engine.gate.set()
    stack.await_no_leases()
    assert stack.client.post(CHAT, json=ASK).status_code == 200


@limits(gateway_queue_seconds=PATIENCE)
def test_who_waits_gets_the_next_place_and_the_queue_is_short(stack: Stack) -> None:
    stack.engine.gate.clear()
    replies: list[httpx.Response] = []
    with stack.stream() as first, stack.stream():
        chunks = contents(first)
        next(chunks)
        waiting = threading.Thread(target=lambda: replies.append(stack.client.post(CHAT, json=ASK)))
        waiting.start()
        until(lambda: stack.context.admission.waiting == 1, "nobody waits")
        error = refused(stack.client.post(CHAT, json=ASK), 429, param=None, code="overloaded")
        assert error["message"].startswith("Too many requests are under way"), "refused without waiting"
        assert stack.context.admission.waiting == 1
        stack.engine.gate.set()
        list(chunks)
        waiting.join(PATIENCE)
    assert [reply.status_code for reply in replies] == [200]


@limits(engine_first_byte_seconds=1.0, engine_reply_seconds=1.5)
@pytest.mark.parametrize(("stream", "seconds"), [(True, "1"), (False, "1.5")])
def test_an_engine_that_begins_no_reply_is_504(stack: Stack, stream: bool, seconds: str) -> None:
    stack.engine.mute.set()
    reply = stack.client.post(CHAT, json={**ASK, "stream": stream})
    error = refused(reply, 504, param=None, code="engine_timeout")
    assert f"silent for {seconds} s" in error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert stack.engine.abandoned.wait(PATIENCE), "its work goes on"
    assert len(stack.engine.requests) == 1, "never again after a timeout"
    stack.engine.mute.clear()
    stack.await_no_leases()


@limits(engine_between_bytes_seconds=1.5)
def test_an_engine_that_falls_silent_ends_the_stream_with_an_error(stack: Stack) -> None:
    stack.engine.gate.clear()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**ASK, stream=True)  # type: ignore[call-overload]
        assert next(stream).choices[0].delta.content == "one"
        with pytest.raises(openai.APIError, match=r"silent for 1\.5 s") as caught:
            list(stream)
    assert caught.value.code == "engine_timeout"
    stack.engine.gate.set()
    stack.await_no_leases()
    metrics = stack.client.get("/metrics").text
    assert 'ratchet_gateway_requests_total{assistant="support",status="504",version="v0"}' in metrics


@pytest.mark.parametrize(("given", "passed"), [("7", "7"), (None, "1"), ("Wed, 21 Oct", "1")])
def test_an_engines_own_429_passes_with_when_to_ask_again(
    stack: Stack, given: str | None, passed: str
) -> None:
    stack.engine.refuse = 429, {"error": {"message": "full", "type": "x", "code": 429}}
    stack.engine.retry_after = given
    reply = stack.client.post(CHAT, json=ASK)
    assert refused(reply, 429, param=None, code="overloaded")["message"] == "full"
    assert reply.headers["retry-after"] == passed
    assert len(stack.engine.requests) == 1


def test_an_engines_own_503_passes_with_when_to_ask_again(stack: Stack) -> None:
    stack.engine.refuse, stack.engine.retry_after = (503, {"error": {"message": "stopping"}}), "9"
    reply = stack.client.post(CHAT, json=ASK)
    refused(reply, 503, param=None, code="engine_unavailable")
    assert reply.headers["retry-after"] == "9"


@pytest.mark.parametrize("status", [429, 503])
def test_another_engine_answers_for_one_that_refuses(
    settings: Settings, base_folder: Path, status: int
) -> None:
    other = Engine("tiny-base")
    with running(settings, base_folder, other) as stack:
        alias = "team_default", "support", "champion"
        until(lambda: len(stack.context.routes.routes.aliases[alias].endpoints) == 2, "one engine answers")
        stack.engine.refuse = status, {"error": {"message": "not now"}}
        replies = [stack.client.post(CHAT, json=ASK) for _ in range(4)]
        assert [reply.status_code for reply in replies] == [200] * 4
        assert stack.engine.requests, "it was asked"
        assert len(other.requests) == 4
