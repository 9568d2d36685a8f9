"""The HTTP API of a real engine process, spoken to by the unmodified openai client."""

import asyncio
import concurrent.futures
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from engine.model import BaseModel
from engine.prompts import Prompt
from engine.requests import Engine
from engine.sequence import Sequence
from engine.server import LARGE_PROMPTS, MAX_BODY_BYTES, create_app

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Bench, Server

ROOT = Path(__file__).parents[3]
MESSAGES = [{"role": "user", "content": "the first of the many"}]


@pytest.fixture(scope="module")
def client(server: "Server") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: "Server") -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    return base.tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text).input_ids)


def continued(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The greedy answer to MESSAGES as transformers gives it."""
    ids = torch.tensor([chat_ids(tokenizer)])
    made = model.generate(ids, max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def ask(client: openai.OpenAI, model: str = "tiny", **fields: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(model=model, messages=MESSAGES, **settings)  # type: ignore[arg-type]


def test_chat(client: openai.OpenAI, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    reply = ask(client)
    assert reply.choices[0].message.content == continued(reference, tokenizer, 12)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.object == "chat.completion"
    prompt = len(chat_ids(tokenizer))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt, 12)
    assert reply.usage.total_tokens == prompt + 12


def test_chat_stream(
    client: openai.OpenAI, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == continued(reference, tokenizer, 12)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > 5


def test_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "temperature": 0, "stream": True}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]


def test_chat_logprobs_and_n(client: openai.OpenAI) -> None:
    reply = ask(client, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2, max_tokens=6)
    again = ask(client, n=3, temperature=1, seed=5, max_tokens=6)
    texts = [choice.message.content for choice in reply.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert reply.usage.completion_tokens == 18
    assert reply.usage.prompt_tokens == again.usage.prompt_tokens == ask(client).usage.prompt_tokens
    for choice in reply.choices:
        scores = choice.logprobs.content
        assert choice.logprobs.refusal is None
        assert "refusal" in choice.logprobs.model_fields_set
        assert len(scores) == 6
        assert all(len(score.top_logprobs) == 2 for score in scores)
        assert all(score.logprob <= score.top_logprobs[0].logprob <= 0 for score in scores)


def test_stream_of_several_choices_is_the_whole_reply(client: openai.OpenAI) -> None:
    whole = ask(client, n=2, temperature=1, seed=1)
    texts = {0: "", 1: ""}
    for chunk in ask(client, n=2, temperature=1, seed=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


def test_stop_strings(client: openai.OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[4:6]
    reply = ask(client, stop=[stop])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stop=stop, stream=True))
    assert streamed == reply.choices[0].message.content


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 4, **fields}
    return client.completions.create(model=settings.pop("model", "tiny"), prompt=prompt, **settings)


def test_prompt_forms(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["the one", "other"]
    ids = [list(tokenizer(text).input_ids) for text in texts]
    answers = [complete(client, text).choices[0].text for text in texts]
    assert [complete(client, one).choices[0].text for one in ids] == answers
    for several in (texts, ids):
        reply = complete(client, several)
        assert [choice.text for choice in reply.choices] == answers
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, "the one", echo=True).choices[0].text == "the one" + answers[0]
    streamed = list(complete(client, "the one", echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "the one" + answers[0]
    default = client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True})
    assert default.usage.completion_tokens == 16


def test_token_ids_beside_the_text(
    client: openai.OpenAI, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The ids of transformers' own greedy answers, the stop token included; deltas of a stream add up."""
    prompts = [list(tokenizer(text).input_ids) for text in ("the one", "other")]
    wanted = []
    for ids in prompts:
        made = reference.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        wanted.append(made[0, len(ids) :].tolist())
    body: dict[str, Any] = {"extra_body": {"return_token_ids": True}}
    reply = complete(client, prompts, **body)
    assert [choice.token_ids for choice in reply.choices] == wanted
    assert [choice.prompt_token_ids for choice in reply.choices] == prompts
    last = wanted[0][-1]
    stopped = complete(client, prompts[0], extra_body={"return_token_ids": True, "stop_token_ids": [last]})
    assert stopped.choices[0].token_ids == wanted[0][: wanted[0].index(last) + 1]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in complete(client, prompts[1], stream=True, **body)]
    assert list(chain.from_iterable(chunk.token_ids for chunk in chunks)) == wanted[1]
    assert chunks[0].prompt_token_ids == prompts[1]
    assert not any("prompt_token_ids" in chunk.model_extra for chunk in chunks[1:])
    assert "token_ids" not in complete(client, prompts[0]).choices[0].model_extra

    chat = ask(client, **body)
    assert chat.prompt_token_ids == chat_ids(tokenizer)
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens
    streamed = list(ask(client, stream=True, **body))
    assert streamed[0].prompt_token_ids == chat.prompt_token_ids
    told = [getattr(chunk.choices[0], "token_ids", []) for chunk in streamed]
    assert list(chain.from_iterable(told)) == chat.choices[0].token_ids


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt(
    client: openai.OpenAI,
    reference: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> None:
    """As lm-eval's local-completions asks (max_tokens 1) and as our own scoring does (0)."""
    prompts = ["the question is é: the answer", "the question is é: the other one"]
    reply = complete(client, prompts, max_tokens=max_tokens, echo=True, logprobs=1, seed=1234)
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        ids = list(tokenizer(prompt).input_ids)
        wanted = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.text_offset) == len(ids) + max_tokens
        assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
        assert choice.text.startswith(prompt)
        for i in range(1, len(ids)):
            assert scores.token_logprobs[i] == pytest.approx(wanted[i - 1, ids[i]].item(), abs=1e-4)
            best = wanted[i - 1].max().item()
            assert max(scores.top_logprobs[i].values()) == pytest.approx(best, abs=1e-4)
        # the boundary of an answer is found by its character
        start = prompt.index(" ", 15)
        assert start in scores.text_offset
        assert scores.tokens[scores.text_offset.index(start)] == " "
        assert scores.text_offset[: len(ids)] == sorted(scores.text_offset[: len(ids)])


def test_models_and_health(http: httpx.Client, model_dir: Path) -> None:
    assert http.get("/health").status_code == 200
    [card] = http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["parent"]) == ("tiny", str(model_dir), None)
    assert card["max_model_len"] == 256


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "told"),
    [
        ("chat/completions", {"model": "nope"}, 404, "model", "The model `nope` does not exist."),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"max_tokens": 1000}, 400, "max_tokens", "window|maximum context length is 256"),
        ("chat/completions", {"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ("chat/completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("chat/completions", {"top_p": 0}, 400, "top_p", "greater than 0"),
        ("chat/completions", {"n": 0}, 400, "n", "greater than or equal to 1"),
        (
            "chat/completions",
            {"presence_penalty": 0.5},
            400,
            "presence_penalty",
            "'presence_penalty' is not supported",
        ),
        ("chat/completions", {"tools": [{}]}, 400, "tools", "'tools' is not supported"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "'logprobs' must be true"),
        ("chat/completions", {"stream_options": {}}, 400, "stream_options", "'stream' is true"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages",
            "",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 300}]},
            400,
            "messages",
            "maximum context length is 256 tokens. However, your request has",
        ),
        ("completions", {"prompt": "x" * 256}, 400, "prompt", "maximum context length is 256"),
        ("completions", {"prompt": "x" * 250, "max_tokens": 7}, 400, "max_tokens", "is too large: 7"),
        ("completions", {"prompt": ""}, 400, "prompt", "empty"),
        ("completions", {"prompt": []}, 400, "prompt", "empty"),
        ("completions", {"prompt": [99999]}, 400, "prompt", "out of vocabulary"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens", "'echo'"),
        ("completions", {"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("completions", {"priority": "first"}, 400, "priority", "valid integer"),
        ("completions", {"suffix": "x"}, 400, "suffix", "'suffix' is not supported"),
    ],
)
def test_refusals(
    http: httpx.Client, path: str, fields: dict[str, Any], status: int, param: str | None, told: str
) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "prompt": "x", **fields}
    reply = http.post(f"/v1/{path}", json=body)
    error = reply.json()["error"]
    assert reply.status_code == status == error["code"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert any(part in error["message"] for part in told.split("|"))


def test_neutral_values_of_unsupported_fields_are_fine(http: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "tools": None,
        "user": "someone",
        "anything_else": 1,
    }
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_malformed_json_and_unknown_route(http: httpx.Client) -> None:
    reply = http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400)
    reply = http.get("/v1/nothing")
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")
    assert http.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_large_prompt_holds_up_nobody(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    engine = Engine("tiny", (bench := make_bench()).model, bench.scheduler)
    reading, asked = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> Prompt:
        reading.set()
        assert asked.wait(20), "nobody else was answered while a prompt was read"
        return Prompt(ids=[1], text="x", offsets=[0])

    monkeypatch.setattr(engine.texts, "prompt_of_text", slow)
    monkeypatch.setattr(engine.texts, "prompt_of_chat", slow)

    async def both() -> int:
        transport = httpx.ASGITransport(app=create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            large = "x" * (LARGE_PROMPTS + 1)
            body = {"model": "tiny", "messages": [{"role": "user", "content": large}], "prompt": large}
            answer = asyncio.create_task(http.post(f"/v1/{path}", json={**body, "max_tokens": 1}))
            while not reading.is_set():
                await asyncio.sleep(0.01)
            assert not asked.is_set()
            assert (await http.get("/health")).status_code == 200
            asked.set()
            return (await answer).status_code

    assert asyncio.run(both()) == 200


@pytest.mark.parametrize("counted", [True, False])
def test_a_body_that_is_too_large_is_refused(http: httpx.Client, counted: bool) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    reply = http.post(
        "/v1/completions",
        content=body if counted else iter([body]),
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 413


def test_a_priority_reaches_the_scheduler(
    make_bench: "Callable[..., Bench]", monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    priorities: list[int] = []
    submit = bench.scheduler.submit

    def noted(sequences: list[Sequence]) -> None:
        priorities.extend(one.priority for one in sequences)
        submit(sequences)

    monkeypatch.setattr(bench.scheduler, "submit", noted)

    async def ask() -> None:
        transport = httpx.ASGITransport(app=create_app(Engine("tiny", bench.model, bench.scheduler)))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            for fields in ({}, {"priority": -1}, {"priority": 3}):
                body = {"model": "tiny", "messages": MESSAGES, "prompt": "x", "max_tokens": 1, **fields}
                for path in ("completions", "chat/completions"):
                    assert (await http.post(f"/v1/{path}", json=body)).status_code == 200

    asyncio.run(ask())
    assert priorities == [0, 0, -1, -1, 3, 3]


def test_a_prompt_as_long_as_the_window_can_be_scored(client: openai.OpenAI) -> None:
    reply = complete(client, "x" * 256, max_tokens=0, echo=True, logprobs=0)
    assert len(reply.choices[0].logprobs.tokens) == 256


@pytest.fixture
def loaded(http: httpx.Client, adapter_dirs: list[Path]) -> Iterator[list[str]]:
    names = ["first-v1", "second-v1"]
    for name, folder in zip(names, adapter_dirs, strict=True):
        reply = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        assert reply.status_code == 200, reply.text
    yield names
    for name in {card["id"] for card in http.get("/v1/models").json()["data"]} - {"tiny"}:
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


def test_adapters_answer_as_themselves_concurrently(
    client: openai.OpenAI,
    http: httpx.Client,
    loaded: list[str],
    adapter_dirs: list[Path],
    reference: LlamaForCausalLM,
    peft_references: list[torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert set(cards) == {"tiny", *loaded}
    assert all(cards[name]["parent"] == "tiny" for name in loaded)
    assert cards["first-v1"]["root"] == str(adapter_dirs[0])
    names = ["tiny", *loaded]
    wanted = [continued(model, tokenizer, 24) for model in (reference, *peft_references)]
    assert len(set(wanted)) == 3
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [(i, pool.submit(ask, client, names[i % 3], max_tokens=24)) for i in range(24)]
        for i, reply in asked:
            assert reply.result().choices[0].message.content == wanted[i % 3]
            assert reply.result().model == names[i % 3]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"lora_name": "first-v1", "lora_path": "GOOD"}, 400, "already been loaded"),
        ({"lora_name": "tiny", "lora_path": "GOOD"}, 400, "already been loaded"),
        ({"lora_name": "x", "lora_path": "/no/such/folder"}, 404, "No adapter found"),
        ({"lora_name": "x"}, 400, "must be provided"),
        ({"lora_path": "GOOD"}, 400, "must be provided"),
        ({"lora_name": "x", "lora_path": "GOOD", "load_inplace": True}, 400, "in place"),
        ({"lora_name": "x", "lora_path": "WIDE"}, 400, "The adapter is invalid"),
    ],
)
def test_refused_loads_leave_nothing(
    http: httpx.Client,
    loaded: list[str],
    adapter_dirs: list[Path],
    tmp_path: Path,
    body: dict[str, Any],
    status: int,
    told: str,
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapter_dirs[0] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (adapter_dirs[1] / "adapter_model.safetensors").read_bytes()
    )
    paths = {"GOOD": str(adapter_dirs[0]), "WIDE": str(tmp_path)}
    if "lora_path" in body:
        body = {**body, "lora_path": paths.get(body["lora_path"], body["lora_path"])}
    reply = http.post("/v1/load_lora_adapter", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, status)
    assert told in reply.json()["error"]["message"]
    assert {card["id"] for card in http.get("/v1/models").json()["data"]} == {"tiny", *loaded}


def test_unload_lets_the_request_in_flight_finish(
    client: openai.OpenAI,
    http: httpx.Client,
    loaded: list[str],
    peft_references: list[torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    wanted = ask(client, "first-v1", max_tokens=200, extra_body={"ignore_eos": True})
    stream = iter(ask(client, "first-v1", max_tokens=200, stream=True, extra_body={"ignore_eos": True}))
    text = next(stream).choices[0].delta.content
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "first-v1"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "first-v1")
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == wanted.choices[0].message.content
    assert text.startswith(continued(peft_references[0], tokenizer, 8))
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "first-v1"}).status_code == 404


WORK = {
    "model": "tiny",
    "prompt": ["x"] * 100,
    "n": 128,
    "max_tokens": 50,
    "ignore_eos": True,
    # Its length keeps all text back until a sequence ends: no news pile up before a client that reads late.
    "stop": "?" * 200,
}
"""Minutes: a test that is held up does not find it done."""


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_slots(
    http: httpx.Client, server: "Server", until: Callable[[Callable[[], bool]], None], stream: bool
) -> None:
    def load() -> int:
        return int(http.get("/load").json()["server_load"])

    body = json.dumps({**WORK, "stream": stream}).encode()
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=60) as leaving:
        head = "POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
        leaving.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert leaving.recv(1024).startswith(b"HTTP/1.1 200 OK")
        until(lambda: load() > 0)
    until(lambda: load() == 0)


def test_sigterm_fails_open_streams_cleanly_and_exits(own_server: "Server") -> None:
    with (
        httpx.Client(base_url=own_server.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json={**WORK, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        own_server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    assert own_server.wait() == 0
    assert own_server.lines[-1]["message"] == "stopped"


STOPPED_BEFORE_IT_LISTENS = """
import os, signal, sys
from engine import service
from engine.__main__ import main
run = service._Http.run
def asked_first(http, sockets):
    os.kill(os.getpid(), signal.SIGTERM)
    run(http, sockets)
service._Http.run = asked_first
sys.exit(main())
"""


def test_sigterm_between_warming_up_and_listening_is_not_lost(model_dir: Path) -> None:
    command = [sys.executable, "-c", STOPPED_BEFORE_IT_LISTENS, "--model", str(model_dir)]
    command += ["--served-model-name", "tiny", "--port", "0", "--dtype", "float32", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert json.loads(done.stderr.splitlines()[-1])["message"] == "stopped"


@pytest.mark.parametrize(
    ("extra", "status", "told"),
    [
        (["--model", "/no/such/folder"], 65, "cannot serve"),
        (["--host", "203.0.113.1"], 69, "cannot listen"),
    ],
)
def test_process_that_cannot_serve_says_why(
    model_dir: Path, extra: list[str], status: int, told: str
) -> None:
    command = [sys.executable, "-m", "engine", "--model", str(model_dir), "--served-model-name", "x"]
    command += ["--port", "0", "--threads", "1", *extra]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert told in json.loads(done.stderr.splitlines()[-1])["message"]
