"""The unmodified openai client against the API and the real engine, over a tiny random model."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conftest_databases import NewDatabase
from tests.integration.http.publishing import publish
from tests.integration.http.stack import Stack
from tests.integration.http.tiny_llama import running_stack, write_llama

pytestmark = pytest.mark.slow

MESSAGES: Any = [{"role": "user", "content": "where is my card?"}]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, new_sqlite: NewDatabase) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_llama(folder, window=128)
    with running_stack(tmp_path_factory.mktemp("home"), new_sqlite(True), folder) as made:
        yield made


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


def test_several_choices_are_drawn_by_seed_and_end_at_a_stop(client: openai.OpenAI) -> None:
    fields: Any = {"model": "support@v0", "messages": MESSAGES, "max_tokens": 8, "temperature": 1, "n": 3}
    first = client.chat.completions.create(**fields, seed=11)
    again = client.chat.completions.create(**fields, seed=11)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage is not None
    assert first.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, seed=11, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    _, whole = ask(client, "support@v0")
    stop = whole[3:5]
    cut = client.chat.completions.create(
        model="support@v0", messages=MESSAGES, temperature=0, max_tokens=12, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole[: whole.index(stop)]


def test_logprobs_are_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "support@v0", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    fields |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert [len(token.top_logprobs) for token in whole.content] == [2] * 5
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in whole.content)
    streamed = [
        token
        for chunk in client.chat.completions.create(**fields, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in whole.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in whole.content])


def test_a_completion_streamed_is_the_completion_whole(client: openai.OpenAI) -> None:
    fields: Any = {"model": "support@v0", "prompt": ["abc", "xyz"], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**fields)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 6
    streamed, usage = ["", ""], None
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    assert usage == whole.usage


def test_what_the_engine_cannot_do_names_its_field(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="not supported") as caught:
        client.chat.completions.create(model="support", messages=MESSAGES, tools=[tool])
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as options:
        client.chat.completions.create(
            model="support", messages=MESSAGES, extra_body={"stream_options": {"include_usage": True}}
        )
    assert options.value.param == "stream_options"
    assert options.value.request_id is not None


def test_the_async_client_raises_the_same(stack: Stack) -> None:
    async def wrong() -> None:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as one:
            with pytest.raises(openai.NotFoundError):
                await one.chat.completions.create(model="nobody", messages=MESSAGES, stream=True)

    asyncio.run(wrong())


def test_refusals_arrive_as_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens") as long:
        client.chat.completions.create(model="support", messages=[{"role": "user", "content": "x" * 200}])
    assert long.value.code == "context_length_exceeded"
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
