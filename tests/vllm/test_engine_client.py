"""Ratchet's client of an engine, against a real vLLM: what evaluation and the swap controller ask of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from domain.demonstration import Message
from domain.errors import EngineUnavailable
from serving.client import EngineClient
from tests.vllm.adapters import BASE
from tests.vllm.server import Server

PREFIX = "The capital of France is"


@pytest.fixture
def client(server: Server) -> Iterator[EngineClient]:
    with EngineClient(server.url) as client:
        yield client


def test_likelihoods_are_those_of_the_tokens(server: Server, client: EngineClient) -> None:
    paris, cheese = client.loglikelihood(BASE, PREFIX, [" Paris", " cheese and wine"])
    assert paris.greedy
    assert not cheese.greedy
    assert paris.logprob > cheese.logprob + 5
    sampled = server.logprobs(BASE, PREFIX)
    assert server.complete(BASE, PREFIX).json()["choices"][0]["text"] == " Paris"
    assert paris.logprob == pytest.approx(sampled[0], abs=0.2)
    # Characters that are spread over several tokens, whose pieces spell nothing.
    [strange] = client.loglikelihood(BASE, PREFIX, [" 𓀀𓂀"])
    assert strange.logprob < -10


def test_many_likelihoods_at_once_leave_the_engine_alive(
    server: Server, client: EngineClient, adapter: Path
) -> None:
    client.load("likely", adapter)
    names = [BASE, "likely"] * 4
    asked = server.together(
        [
            lambda name=name: client.loglikelihood(name, PREFIX, [" Paris", " Rome", " Madrid"])
            for name in names
        ]
    )
    client.unload("likely")
    for name, likelihoods in zip(names, asked, strict=True):
        expected = asked[names.index(name)]
        assert [one.logprob for one in likelihoods] == pytest.approx(
            [one.logprob for one in expected], abs=0.5
        )
    assert server.answers()


def test_loading_unloading_and_probing_are_repeatable(
    server: Server, client: EngineClient, adapter: Path
) -> None:
    client.load("helper-v1-01234567", adapter)
    client.load("helper-v1-01234567", adapter)
    assert {BASE, "helper-v1-01234567"} <= client.models()
    assert client.probe("helper-v1-01234567") != client.probe(BASE)
    client.unload("helper-v1-01234567")
    client.unload("helper-v1-01234567")
    assert "helper-v1-01234567" not in client.models()
    with pytest.raises(EngineUnavailable) as gone:
        client.probe("helper-v1-01234567")
    assert gone.value.code == "model_not_loaded"


def test_a_refused_adapter_and_a_chat(client: EngineClient, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable) as refused:
        client.load("nowhere", tmp_path / "nowhere")
    assert refused.value.message
    assert client.chat(BASE, [Message(role="user", content="Say hello.")], 8)
