"""The engine client against a real HTTP server; likelihoods worked out by hand (-len/10 per token)."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from domain.demonstration import Message
from domain.errors import EngineUnavailable
from serving.client import EngineClient


@pytest.fixture
def client(engine: Any) -> Iterator[EngineClient]:
    with EngineClient(engine.url) as client:
        yield client


def test_likelihoods_are_summed_over_the_continuation(client: EngineClient) -> None:
    sat, zebra = client.loglikelihood("base", "the cat", [" sat down", " zebra"])
    assert sat.logprob == pytest.approx(-(4 + 5) / 10)
    assert sat.greedy
    assert zebra.logprob == pytest.approx(-0.6)
    assert not zebra.greedy


def test_a_token_across_the_boundary_belongs_to_the_continuation(client: EngineClient) -> None:
    [(logprob, _)] = client.loglikelihood("base", "x ab", ["cd ef"])
    assert logprob == pytest.approx(-(len(" abcd") + len(" ef")) / 10)


def test_a_begin_of_text_token_is_not_scored(engine: Any, client: EngineClient) -> None:
    engine.bos = True
    [(logprob, _)] = client.loglikelihood("base", "the cat", [" sat"])
    assert logprob == pytest.approx(-0.4)


def test_tokens_that_do_not_spell_the_text_are_counted_instead(engine: Any, client: EngineClient) -> None:
    engine.garbled = True
    first, second = client.loglikelihood("base", "the cat", [" sat down", " ran"])
    assert first.logprob == pytest.approx(-0.9)
    assert second.logprob == pytest.approx(-0.4)


def test_a_likelihood_needs_a_prefix(client: EngineClient) -> None:
    with pytest.raises(ValueError, match="prefix"):
        client.loglikelihood("base", "", ["x"])


def test_chat_returns_the_reply(client: EngineClient) -> None:
    assert client.chat("base", [Message(role="user", content="hi")], 8) == "base says hi"


def test_adapters_load_once_and_unload_once(
    engine: Any, client: EngineClient, tmp_path: Path, adapter: Any
) -> None:
    folder = adapter(tmp_path / "a")
    client.load("helper-v1", folder)
    client.load("helper-v1", folder)
    assert client.models() == {"base", "helper-v1"}
    assert client.probe("helper-v1") == pytest.approx((-0.65, -0.65))
    client.unload("helper-v1")
    client.unload("helper-v1")
    assert client.models() == {"base"}


def test_a_refused_adapter_says_why(engine: Any, client: EngineClient, tmp_path: Path, adapter: Any) -> None:
    engine.refuse["helper"] = (500, "rank 64 is above --max-lora-rank 16")
    with pytest.raises(
        EngineUnavailable, match=r"refused to load 'helper-v1' \(HTTP 500\): rank 64"
    ) as caught:
        client.load("helper-v1", adapter(tmp_path / "a"))
    assert caught.value.code == "engine_refused"


def test_a_missing_folder_is_refused(client: EngineClient, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="No adapter at"):
        client.load("helper-v1", tmp_path / "nowhere")


def test_an_unknown_model_is_told_from_a_dead_engine(client: EngineClient) -> None:
    with pytest.raises(EngineUnavailable, match="does not exist") as caught:
        client.chat("gone", [Message(role="user", content="hi")], 8)
    assert caught.value.code == "model_not_loaded"


def test_a_dead_engine_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with EngineClient(url) as client:
            assert not client.healthy()
            with pytest.raises(EngineUnavailable, match=f"at {url} does not answer") as caught:
                client.models()
    assert caught.value.code == "engine_unavailable"


def test_a_probe_that_is_not_a_number_fails(engine: Any, client: EngineClient) -> None:
    engine.bad_probe.add("base")
    with pytest.raises(EngineUnavailable, match="not finite"):
        client.probe("base")


def test_a_probe_goes_first_where_the_engine_takes_priorities(engine: Any, client: EngineClient) -> None:
    client.probe("base")
    with EngineClient(engine.url, priorities=True) as first:
        first.probe("base")
        first.loglikelihood("base", "a", [" b"])
    assert engine.priorities == [None, -1, None]


def test_a_client_is_used_from_many_threads(client: EngineClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(
            pool.map(lambda n: client.chat("base", [Message(role="user", content=str(n))], 4), range(40))
        )
    assert replies == [f"base says {n}" for n in range(40)]
