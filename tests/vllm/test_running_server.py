"""A vLLM that runs already and is named by RATCHET_ENGINE_URL: found, swapped on, and asked nothing risky."""

from collections.abc import Iterator
from pathlib import Path

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
from tests.vllm.server import PROMPT, Server


@pytest.fixture
def app(server: Server, tmp_path: Path) -> FastAPI:
    settings = Settings(home=tmp_path, engine="vllm", engine_url=server.url, engine_adapters=5)
    upgrade(settings.resolved_database_url)
    settings.work_dir.mkdir()
    return create_app(settings)


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
    context = app.state.context
    add_version(
        context.sessions,
        context.store,
        context.settings.work_dir,
        "named",
        write=lambda folder, number: write(folder, weights(number)),
    )
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


def names(server: Server) -> set[str]:
    return {card["id"] for card in server.http.get("/v1/models").json()["data"]}
