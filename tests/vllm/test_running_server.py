"""vLLM that runs already and is named by RATCHET_ENGINE_URL: found, swapped on, and asked nothing risky."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from domain.settings import Settings
from registry.session import upgrade
from tests.integration.http.publishing import add_version
from tests.integration.http.server import served
from tests.integration.test_up import until
from tests.vllm.adapters import BASE, weights, write
from tests.vllm.server import PROMPT, Server, free_port, serving, with_group_gone

ONE = {"max_tokens": 1, "temperature": 0}


def app_for(home: Path, engine_url: str) -> FastAPI:
    settings = Settings(home=home, engine="vllm", engine_url=engine_url, engine_adapters=5)
    upgrade(settings.resolved_database_url)
    settings.work_dir.mkdir()
    return create_app(settings)


@pytest.fixture
def app(server: Server, tmp_path: Path) -> FastAPI:
    return app_for(tmp_path, server.url)


@pytest.fixture
def client(app: FastAPI) -> Iterator[httpx.Client]:
    with served(app) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_versions_are_served_by_a_server_that_ran_already(
    server: Server, app: FastAPI, client: httpx.Client
) -> None:
    assert client.post("/v1/assistants", json={"name": "named", "base_model": BASE}).status_code == 201
    body = {"model": "named", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    base = client.post("/v1/completions", json=body)
    assert (base.status_code, base.headers["x-model-version"]) == (200, "v0"), base.text
    publish(app, "named")
    until(lambda: client.post("/v1/completions", json=body).headers["x-model-version"] == "v1", 60, "no v1")
    values = [
        reply.json()["choices"][0]["logprobs"]["token_logprobs"][0]
        for reply in (base, client.post("/v1/completions", json=body))
    ]
    assert abs(values[0] - values[1]) > 0.05
    assert {"named-v1"} <= {name.rpartition("-")[0] for name in names(server)}

    # Its flags are unknown here: the request that ends a vLLM without --lora-target-modules is not passed on.
    refused = client.post("/v1/completions", json=body | {"echo": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


def test_two_servers_take_every_version_and_one_that_comes_back_catches_up(
    server: Server, tmp_path: Path
) -> None:
    """One is killed, a version is published meanwhile, and the killed one is started again where it was."""
    port = free_port()
    app = app_for(tmp_path, f"{server.url},http://127.0.0.1:{port}")
    flags: dict[str, Any] = {"port": port, "engine_adapters": 5, "engine_batch_adapters": 2}
    with (
        serving(folder(tmp_path, "second"), **flags) as second,
        served(app) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        made = client.post("/v1/assistants", json={"name": "paired", "base_model": BASE})
        assert made.status_code == 201, made.text

        def version() -> str:
            reply = client.post("/v1/completions", json={"model": "paired", "prompt": PROMPT, **ONE})
            assert reply.status_code == 200, reply.text
            return reply.headers["x-model-version"]

        publish(app, "paired")
        until(lambda: "v1" in loaded(server, "paired") & loaded(second, "paired"), 120, "no v1")
        until(lambda: version() == "v1", 60, "v1 does not serve")

        second.process.kill()
        second.process.wait()
        with_group_gone(second.process.pid)
        assert [version() for _ in range(4)] == ["v1"] * 4
        publish(app, "paired")
        until(lambda: version() == "v2", 120, "v2 does not serve from the server that is left")
        with serving(folder(tmp_path, "again"), **flags) as again:
            until(lambda: "v2" in loaded(again, "paired"), 120, "the second did not catch up")
            assert [version() for _ in range(4)] == ["v2"] * 4


def folder(home: Path, name: str) -> Path:
    made = home / name
    made.mkdir()
    return made


def publish(app: FastAPI, assistant: str) -> None:
    context = app.state.context
    add_version(
        context.sessions,
        context.store,
        context.settings.work_dir,
        assistant,
        write=lambda folder, number: write(folder, weights(number)),
    )


def loaded(server: Server, assistant: str) -> set[str]:
    """Numbers of the assistant's versions that the server has."""
    found = [name.split("-") for name in names(server) if name.startswith(f"{assistant}-v")]
    return {number for _, number, _ in found}


def names(server: Server) -> set[str]:
    return {card["id"] for card in server.http.get("/v1/models").json()["data"]}
