"""The unmodified openai client against the API and the real engine, over a tiny random model."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from registry import serving
from tests.conftest_databases import NewDatabase
from tests.integration.http.engine import Engine
from tests.integration.http.publishing import publish
from tests.integration.http.server import served
from tests.integration.http.stack import Stack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MESSAGES: Any = [{"role": "user", "content": "where is my card?"}]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
"""Of the size that `publishing.SIZES` was worked out for."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, written without torch; its tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.embed_tokens": (257, 8), "lm_head": (257, 8), "model.norm": (8,)}
    for layer in range(2):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{side}_proj": (8, 8) for side in "qo"}
        shapes |= {f"{stem}.self_attn.{side}_proj": (4, 8) for side in "kv"}
        shapes |= {f"{stem}.mlp.{name}_proj": (12, 8) for name in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj": (8, 12)}
        shapes |= {f"{stem}.{place}_layernorm": (8,) for place in ("input", "post_attention")}
    random = np.random.default_rng(3)
    weights = {
        f"{name}.weight": (random.normal(0, 0.5, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine_url(model_folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "engine", "--model", str(model_folder), "--served-model-name", "tiny"]
    command += ["--port", "0", "--dtype", "float32", "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ready: Queue[int | None] = Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and json.loads(line)["message"] == "ready":
                ready.put(int(json.loads(line)["port"]))
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        port = ready.get(timeout=90)
        assert port is not None, "the engine did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, new_sqlite: NewDatabase, model_folder: Path, engine_url: str
) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("home")
    app = create_app(Settings(home=home, cache_dir=home / "cache", database_url=new_sqlite(True)))
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        context: Context = app.state.context
        with context.sessions.begin() as session:
            serving.register_replica(session, engine_url, str(model_folder), "tiny")
        body = {"name": "support", "base_model": str(model_folder)}
        assert client.post("/v1/assistants", json=body).status_code == 201
        stack = Stack(client, Engine("unused"), context, url)
        stack.await_version(0)
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="accepted and ignored", max_retries=0) as one:
        yield one


def ask(client: openai.OpenAI, model: str) -> tuple[str, str]:
    """(version that answered, its greedy text)."""
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=12
    )
    reply = raw.parse()
    assert reply.model == model
    return raw.headers["x-model-version"], reply.choices[0].message.content or ""


def test_models_are_listed(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[:2] == ["support", "support@champion"]
    assert "support@v0" in ids
    assert client.models.retrieve("support@v0").object == "model"


def test_a_chat_streamed_is_the_chat_whole(client: openai.OpenAI) -> None:
    version, whole = ask(client, "support@v0")
    assert version == "v0"
    assert whole
    stream = client.chat.completions.create(
        model="support@v0",
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"support@v0"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 12


def test_the_async_client_works_as_well(stack: Stack, client: openai.OpenAI) -> None:
    _, expected = ask(client, "support@v0")

    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as one:
            fields: Any = {"model": "support@v0", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
            whole = await one.chat.completions.create(**fields)
            stream = await one.chat.completions.create(**fields, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            return whole.choices[0].message.content or "", "".join(parts)

    assert asyncio.run(both()) == (expected, expected)


def test_completions_carry_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="support@v0", prompt="abc", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[:3] == ["a", "b", "c"]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in logprobs.token_logprobs[1:])


def test_refusals_arrive_as_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens"):
        client.chat.completions.create(model="support", messages=[{"role": "user", "content": "x" * 200}])
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="support", messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as odd:
        client.chat.completions.create(model="support", messages=MESSAGES, extra_body={"prompt_logprobs": 1})
    assert (odd.value.code, odd.value.param) == ("unknown_parameter", "prompt_logprobs")


def test_versions_answer_differently_and_a_rollback_brings_the_old_answer_back(
    stack: Stack, client: openai.OpenAI
) -> None:
    before = ask(client, "support")
    assert before[0] == "v0"
    assert publish(stack.context, "support") == 1
    stack.await_version(1)
    after = ask(client, "support")
    assert after[0] == "v1"
    assert after[1] != before[1]
    assert ask(client, "support@v1") == after
    assert ask(client, "support@v0") == before
    reply = stack.client.post("/v1/assistants/support/rollback", json={}).json()
    assert (reply["to_version"], reply["serving"]) == ("v0", True)
    assert ask(client, "support") == before
