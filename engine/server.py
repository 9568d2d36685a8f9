"""The HTTP routes, as vLLM has them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from engine.errors import BadRequest, EngineError
from engine.inbox import ClientGone, Inbox
from engine.prompts import Prompt, TokenTexts
from engine.protocol import ChatBody, CompletionBody, LoadAdapterBody, SamplingFields, UnloadAdapterBody
from engine.replies import ChatReply, CompletionReply, usage
from engine.requests import Engine
from engine.sequence import Sequence

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
CLIENT_CLOSED_REQUEST = 499
MAX_BODY_BYTES = 8 * 1024 * 1024
"""Twice what the gateway passes on. It is read on the event loop, where it holds up every other request."""
LARGE_PROMPTS = 16_384
"""Characters or token ids of a request above which its prompts are read beside the event loop, where they
would hold up every other request. About 15 ms of tokenizing."""

_Read = TypeVar("_Read")


def create_app(engine: Engine) -> FastAPI:
    """The application over a warm engine."""
    app = FastAPI(
        title="engine", docs_url=None, redoc_url=None, openapi_url=None, max_body_size=MAX_BODY_BYTES
    )
    app.add_exception_handler(EngineError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    # One thread: the cores are the model's.
    reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-prompts")

    async def read(size: int, prompts: Callable[[], _Read]) -> _Read:
        if size <= LARGE_PROMPTS:
            return prompts()
        return await asyncio.get_running_loop().run_in_executor(reading, prompts)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.scheduler.healthy else 503)

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": engine.scheduler.load}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [_card(engine, engine.name, engine.started, root=engine.model.path, parent=None)]
        for adapter in engine.adapters.list():
            cards.append(_card(engine, adapter.name, adapter.created, root=adapter.path, parent=engine.name))
        return {"object": "list", "data": cards}

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadAdapterBody) -> Response:
        if not body.lora_name or not body.lora_path:
            raise BadRequest(
                "Both 'lora_name' and 'lora_path' must be provided.",
                param="lora_path" if body.lora_name else "lora_name",
                type="InvalidUserInput",
            )
        if body.load_inplace:
            raise BadRequest("A loaded adapter is never replaced in place.", param="load_inplace")
        folder = Path(body.lora_path)
        await run_in_threadpool(engine.adapters.load, body.lora_name, folder, engine.model.module)
        logger.info("adapter loaded", extra={"adapter": body.lora_name, "path": body.lora_path})
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadAdapterBody) -> Response:
        if not body.lora_name:
            raise BadRequest("'lora_name' must be provided.", param="lora_name", type="InvalidUserInput")
        engine.adapters.unload(body.lora_name)
        logger.info("adapter unloaded", extra={"adapter": body.lora_name})
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        messages = [message.rendered() for message in body.messages]
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if wanted == 0:
            raise BadRequest("'max_tokens' must be at least 1.", param="max_tokens")
        size = sum(len(text) for message in messages for text in message.values())
        asked = partial(
            engine.texts.prompt_of_chat, messages, add_generation_prompt=body.add_generation_prompt
        )
        prompt = await read(size, asked)
        inbox = Inbox(engine.scheduler)
        sequences = engine.sequences(
            body,
            [prompt],
            inbox,
            max_tokens=wanted,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            score_prompt=False,
        )
        reply = ChatReply(
            body.model,
            engine.texts,
            logprobs=bool(body.logprobs),
            token_ids_of=prompt if body.return_token_ids else None,
        )
        return await _respond(body, request, inbox, sequences, reply)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise BadRequest("'max_tokens' must be at least 1, or 0 with 'echo'.", param="max_tokens")
        prompts = await read(sum(map(len, body.prompts)), partial(_prompts, engine.texts, body.prompts))
        inbox = Inbox(engine.scheduler)
        sequences = engine.sequences(
            body,
            prompts,
            inbox,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            score_prompt=body.echo and body.logprobs is not None,
        )
        reply = CompletionReply(
            body.model,
            engine.texts,
            prompts=prompts,
            sequences=sequences,
            choices_per_prompt=body.n,
            echo=body.echo,
            token_ids=bool(body.return_token_ids),
        )
        return await _respond(body, request, inbox, sequences, reply)

    return app


def _prompts(texts: TokenTexts, given: list[str] | list[list[int]]) -> list[Prompt]:
    return [texts.prompt_of_text(one) if isinstance(one, str) else texts.prompt_of_ids(one) for one in given]


async def _respond(
    body: SamplingFields,
    request: Request,
    inbox: Inbox,
    sequences: list[Sequence],
    reply: ChatReply | CompletionReply,
) -> Response:
    with ExitStack() as stack:
        stack.enter_context(inbox)
        inbox.submit(sequences)
        if body.stream:
            # The stream outlives this call: it closes the inbox itself.
            return StreamingResponse(
                _events(inbox, stack.pop_all(), reply, body), media_type="text/event-stream"
            )
        try:
            outputs = await inbox.finished(request)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(reply.whole(outputs, usage(sequences, body.n)))


async def _events(
    inbox: Inbox, closing: ExitStack, reply: ChatReply | CompletionReply, body: SamplingFields
) -> AsyncIterator[str]:
    """Server-sent events until `[DONE]`; an error becomes an event, since the status is already sent."""
    with closing:
        try:
            opened = False
            # Asked for usage, OpenAI's chunks have the field from the first one on.
            unused = {"usage": None} if body.include_usage else {}
            async for output in inbox.outputs():
                if not opened:  # not before there is news: until then, whoever waits may ask elsewhere
                    opened = True
                    for index in range(len(inbox.sequences)):
                        for chunk in reply.opening(index):
                            yield _event({**chunk, **unused})
                for chunk in reply.chunks(output):
                    yield _event({**chunk, **unused})
            if body.include_usage:
                yield _event(reply.usage_chunk(usage(inbox.sequences, body.n)))
        except EngineError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _card(engine: Engine, name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "engine",
        "root": root,
        "parent": parent,
        "max_model_len": engine.model.max_length,
    }


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return JSONResponse(error.body(), status_code=error.status)


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    param = path[0] if path else None
    text = f"{'.'.join(path)}: {message}" if path else message
    return _refused(_, BadRequest(text, param=param))


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = EngineError(str(error.detail), type="NotFoundError" if error.status_code == 404 else None)
    return JSONResponse({"error": {**refusal.body()["error"], "code": error.status_code}}, error.status_code)
