"""The gateway in front of an engine that answers, refuses, breaks off and goes away."""

import asyncio
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from registry import serving
from tests.conftest_databases import NewDatabase
from tests.integration.http.assertions import refused
from tests.integration.http.engine import Engine
from tests.integration.http.server import served
from tests.integration.http.stack import ASK, CHAT, PATIENCE, Stack, answer, contents, running, until


@pytest.fixture(scope="module")
def one_stack(
    tmp_path_factory: pytest.TempPathFactory, new_sqlite: NewDatabase, base_folder: Path
) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, cache_dir=home / "cache", database_url=new_sqlite(True))
    with running(settings, base_folder) as stack:
        yield stack


@pytest.fixture
def stack(one_stack: Stack) -> Stack:
    """Shared by the tests of this module, none of which changes what serves; the engine is well again."""
    engine = one_stack.engine
    engine.requests.clear()
    engine.abandoned.clear()
    engine.refuse, engine.break_off, engine.error = None, 0, None
    engine.gate.set()
    return one_stack


def test_a_reply_comes_under_the_name_that_was_asked_for(stack: Stack) -> None:
    fields = {"user": "u-1", "metadata": {"a": "b"}, "temperature": 0, "stop": None, "max_tokens": 5}
    reply = stack.client.post(CHAT, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == "support"
    assert reply.json()["choices"][0]["message"]["content"] == answer("tiny-base")
    assert reply.headers["x-model-version"] == "v0"
    assert reply.headers["x-request-id"].startswith("req_")
    [seen] = stack.engine.requests
    assert seen == {"model": "tiny-base", "messages": ASK["messages"], "temperature": 0, "max_tokens": 5}
    stack.await_no_leases()


def test_plain_completions_are_forwarded(stack: Stack) -> None:
    reply = stack.client.post("/v1/completions", json={"model": "support@v0", "prompt": "x"})
    assert (reply.status_code, reply.json()["model"]) == (200, "support@v0")
    assert reply.json()["choices"][0]["text"] == "tiny-base completes"


def test_a_stream_passes_chunk_by_chunk(stack: Stack) -> None:
    stack.engine.gate.clear()
    with stack.stream() as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.headers["x-model-version"] == "v0"
        chunks = contents(reply)
        # The engine is still in the middle of its answer.
        assert next(chunks) == ("support", "one")
        assert stack.leases() == 1
        stack.engine.gate.set()
        assert list(chunks) == [
            ("support", "two\u2028"),
            ("support", "tiny-base"),
            ("support", "é"),
            ("", "[DONE]"),
        ]
    stack.await_no_leases()


@pytest.mark.parametrize("model", ["support", "support@champion", "support@v0"])
def test_an_assistant_an_alias_and_a_version_name_the_same(stack: Stack, model: str) -> None:
    reply = stack.client.post(CHAT, json={**ASK, "model": model})
    assert (reply.json()["model"], reply.headers["x-model-version"]) == (model, "v0")


@pytest.mark.parametrize(
    "model",
    ["nobody", "support@canary", "support@v7", "support@", "@v0", "tiny-base", "../x", "support@v0@v0", ""],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404(stack: Stack, model: str, stream: bool) -> None:
    reply = stack.client.post(CHAT, json={**ASK, "model": model, "stream": stream})
    refused(reply, 404, param="model", code="model_not_found")
    assert stack.engine.requests == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"[]", None, "invalid_input"),
        (b'{"model": "support", "messages": [], "temperature": NaN}', None, "invalid_json"),
        (b'{"model": "support", "messages": [{"content": "\\uD800"}]}', None, "invalid_json"),
        (
            b'{"model": "support", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
            None,
            "invalid_json",
        ),
        (b"[" * 100_000, None, "invalid_json"),
        (b"{}", "model", "invalid_input"),
        (b'{"model": 7}', "model", "invalid_input"),
        (b'{"model": "support", "stream": "yes"}', "stream", "invalid_input"),
        (b'{"model": "support", "prompt_logprobs": 1}', "prompt_logprobs", "unknown_parameter"),
        (b'{"model": "support", "chat_template": "x"}', "chat_template", "unknown_parameter"),
        (b'{"model": "support", "audio": {}}', "audio", "unsupported_parameter"),
    ],
)
def test_a_wrong_request_is_400(stack: Stack, body: bytes, param: str | None, code: str) -> None:
    reply = stack.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    refused(reply, 400, param=param, code=code)
    assert stack.engine.requests == []


def test_the_engines_refusal_passes_under_our_name(stack: Stack) -> None:
    inner = {
        "message": "tiny-base: too many tokens",
        "type": "BadRequestError",
        "param": "messages",
        "code": 400,
    }
    stack.engine.refuse = 400, {"error": inner}
    for stream in (False, True):
        reply = stack.client.post(CHAT, json={**ASK, "stream": stream})
        error = refused(reply, 400, param="messages", code=None)
        assert error["message"] == "support: too many tokens"
        assert reply.headers["x-model-version"] == "v0"
    stack.await_no_leases()


def test_every_character_passes(stack: Stack) -> None:
    words = "\ud55c\uae00 \U0001f642 \u2028 \0 e\u0301"
    for ascii_only in (True, False):
        body = json.dumps({**ASK, "messages": [{"role": "user", "content": words}]}, ensure_ascii=ascii_only)
        assert stack.client.post(CHAT, content=body.encode()).status_code == 200
    assert [request["messages"][0]["content"] for request in stack.engine.requests] == [words, words]


def test_a_prompt_that_is_too_long_has_openais_code(stack: Stack) -> None:
    message = "This model's maximum context length is 8 tokens. However, your request has 9 input tokens."
    stack.engine.refuse = 400, {"error": {"message": message, "param": "messages", "code": 400}}
    refused(stack.client.post(CHAT, json=ASK), 400, param="messages", code="context_length_exceeded")


def test_the_engines_failure_is_not_told(stack: Stack) -> None:
    stack.engine.refuse = 500, {"error": {"message": "Traceback: secret", "code": 500}}
    reply = stack.client.post(CHAT, json=ASK)
    refused(reply, 502, param=None, code="engine_error")
    assert "secret" not in reply.text
    assert len(stack.engine.requests) == 1


def test_a_request_whose_reply_has_not_begun_is_sent_again(stack: Stack) -> None:
    """503 is what a stopping engine says; the retry finds it well again."""
    stack.engine.refuse = 503, {"error": {"message": "stopping"}}
    reply = stack.client.post(CHAT, json=ASK)
    refused(reply, 503, param=None, code="engine_unavailable")
    assert reply.headers["retry-after"] == "1"
    assert len(stack.engine.requests) == 2
    stack.await_no_leases()


def test_a_stream_that_breaks_off_ends_with_an_error(stack: Stack) -> None:
    stack.engine.break_off = 1
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(**ASK, stream=True)  # type: ignore[call-overload]
    assert next(stream).choices[0].delta.content == "one"
    with pytest.raises(openai.APIError, match="broke off"):
        list(stream)
    assert len(stack.engine.requests) == 1  # never sent again once the reply had begun
    stack.await_no_leases()


@pytest.mark.parametrize(("empty", "status"), [(1, 200), (2, 503)])
def test_a_stream_without_a_byte_has_not_begun(stack: Stack, empty: int, status: int) -> None:
    stack.engine.empty = empty
    with stack.stream() as reply:
        assert reply.status_code == status
        reply.read()
    assert len(stack.engine.requests) == 2
    stack.await_no_leases()


@pytest.mark.parametrize(
    ("code", "status", "told", "times"),
    [
        (503, 503, "engine_unavailable", 2),
        (500, 502, "engine_error", 1),
        (400, 400, None, 1),
        ("no number", 502, "engine_error", 1),
    ],
)
def test_a_stream_that_begins_with_an_error_has_not_begun(
    stack: Stack, code: int | str, status: int, told: str | None, times: int
) -> None:
    stack.engine.error = {"message": "tiny-base cannot", "type": "x", "param": None, "code": code}
    with stack.stream() as reply:
        reply.read()
        error = refused(reply, status, param=None, code=told)
    if status == 400:
        assert error["message"] == "support cannot"
    assert len(stack.engine.requests) == times
    stack.await_no_leases()


def test_an_engine_that_is_gone_is_503(settings: Settings, base_folder: Path) -> None:
    app = create_app(settings)
    with (
        socket.socket() as closed,
        served(app) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        closed.bind(("127.0.0.1", 0))  # and does not listen; nobody else can either
        port = closed.getsockname()[1]
        context: Context = app.state.context
        client.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
        refused(client.post(CHAT, json=ASK), 503, param=None, code="engine_unavailable")
        with context.sessions.begin() as session:
            serving.register_replica(session, f"http://127.0.0.1:{port}", str(base_folder), "tiny-base")
        refused(client.post(CHAT, json=ASK), 503, param=None, code="engine_unavailable")
        alias = client.get("/v1/assistants/support/aliases/champion").json()
        assert alias["serving_version"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_engines_work(stack: Stack, stream: bool) -> None:
    stack.engine.gate.clear()

    async def ask_and_leave() -> None:
        async with asyncio.timeout(PATIENCE), httpx.AsyncClient(base_url=stack.url, timeout=None) as client:
            if stream:
                async with client.stream("POST", CHAT, json={**ASK, "stream": True}) as reply:
                    async for _ in reply.aiter_bytes():
                        return
            asking = asyncio.create_task(client.post(CHAT, json=ASK))
            while not stack.engine.requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(ask_and_leave())
    assert stack.engine.abandoned.wait(PATIENCE)
    stack.engine.gate.set()
    assert stack.client.post(CHAT, json=ASK).status_code == 200
    stack.await_no_leases()


def test_the_metrics_tell_what_serves_and_who_asked(stack: Stack) -> None:
    before = dict(line.rsplit(" ", 1) for line in stack.client.get("/metrics").text.splitlines())
    stack.client.post(CHAT, json=ASK)
    stack.client.post(CHAT, json={**ASK, "model": "nobody"})
    samples = dict(line.rsplit(" ", 1) for line in stack.client.get("/metrics").text.splitlines())
    changes = {
        name: float(samples[name]) - float(before.get(name, 0))
        for name in (
            'ratchet_gateway_requests_total{assistant="support",status="200",version="v0"}',
            'ratchet_gateway_requests_total{assistant="",status="404",version=""}',
            'ratchet_gateway_first_byte_seconds_count{assistant="support"}',
            'ratchet_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}',
        )
    }
    assert set(changes.values()) == {1.0}, changes
    serves = 'ratchet_serving_version_info{alias="champion",assistant="support",version="v0"}'
    assert samples[serves] == "1.0"


def test_an_engine_that_the_settings_name_is_found(settings: Settings, base_folder: Path) -> None:
    engine = Engine(str(base_folder))
    with served(engine.app) as engine_url:
        app = create_app(settings.model_copy(update={"engine_url": engine_url}))
        with served(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
            client.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
            reply = client.post(CHAT, json=ASK)
            assert (reply.status_code, reply.headers["x-model-version"]) == (200, "v0")
            engines = client.get("/readyz").json()["checks"]["engines"]
            assert engines == {str(base_folder): {"ok": True, "error": None}}


def test_a_server_that_another_one_replaces_answers_for_that_ones_base(
    settings: Settings, base_folder: Path, tmp_path: Path
) -> None:
    other_base = tmp_path / "other-base"
    shutil.copytree(base_folder, other_base)
    engine = Engine(str(base_folder))
    with served(engine.app) as engine_url:
        app = create_app(settings.model_copy(update={"engine_url": engine_url}))
        with served(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
            for name, base in (("support", base_folder), ("other", other_base)):
                client.post("/v1/assistants", json={"name": name, "base_model": str(base)})
            assert client.post(CHAT, json=ASK).status_code == 200
            engine.base = str(other_base)
            other = {**ASK, "model": "other"}
            until(lambda: client.post(CHAT, json=other).status_code == 200, "the other base is not found")
            refused(client.post(CHAT, json=ASK), 503, param=None, code="engine_unavailable")


def test_every_engine_of_a_list_becomes_a_replica(settings: Settings, base_folder: Path) -> None:
    """One serves the base under its own name, the other under another one, from the base's folder."""
    first, second = Engine(str(base_folder)), Engine("served")
    second.root = str(base_folder)
    with served(first.app) as one, served(second.app) as two:
        app = create_app(settings.model_copy(update={"engine_url": f"{one}, {two}/"}))
        with served(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
            client.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
            asked: set[str] = set()

            def both() -> bool:
                body = {"model": "support", "prompt": "x", "max_tokens": 1}
                reply = client.post("/v1/completions", json=body).json()
                asked.add(reply["choices"][0]["text"])
                return len(asked) == 2

            until(both, "one engine answers")
            assert asked == {f"{base_folder} completes", "served completes"}
