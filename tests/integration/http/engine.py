"""A small real HTTP server that speaks the engine's API, with switches for what engines do when they fail."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

WORDS = ("one", "two\u2028", "<model>", "é")
"""What a chat answers, chunk by chunk; `<model>` becomes the name of the engine's model."""


class Engine:
    def __init__(self, base: str) -> None:
        self.base = base
        self.root: str | None = None
        """Where the base was loaded from, as it is listed."""
        self.adapters: set[str] = set()
        self.requests: list[dict[str, Any]] = []
        """Chats."""
        self.priorities: set[int | None] = set()
        """Of plain completions, which the controller's probes are."""
        self.gate = threading.Event()
        """Completions stop after their first word until it is set."""
        self.gate.set()
        self.loading = threading.Event()
        """Loads wait until it is set."""
        self.loading.set()
        self.loads = 0
        """Of adapters, so far."""
        self.refuse: tuple[int, Any] | None = None
        """Status and body of every completion."""
        self.retry_after: str | None = None
        """What a refusal adds."""
        self.broken: set[str] = set()
        """Models whose chats end with 500."""
        self.full: set[str] = set()
        """Models whose chats are refused with 429."""
        self.delays: dict[str, float] = {}
        """Seconds before a model's chat begins."""
        self.mute = threading.Event()
        """While set, chats begin no reply."""
        self.break_off = 0
        """Completions, from now on, that end by a broken connection after their first word."""
        self.empty = 0
        """Streams, from now on, that end before they begin."""
        self.error: dict[str, Any] | None = None
        """What streams hold in place of words."""
        self.abandoned = threading.Event()
        """A client went away before its completion was whole."""
        self.app = FastAPI()
        self.app.get("/health")(self.health)
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/load_lora_adapter")(self.load)
        self.app.post("/v1/unload_lora_adapter")(self.unload)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/chat/completions")(self.chat)

    async def health(self) -> Response:
        return Response()

    async def models(self) -> dict[str, Any]:
        cards = [{"id": self.base, "parent": None, "root": self.root}]
        return {"data": cards + [{"id": name, "parent": self.base} for name in sorted(self.adapters)]}

    async def load(self, request: Request) -> Response:
        while not self.loading.is_set():
            await asyncio.sleep(0.01)
        self.adapters.add((await request.json())["lora_name"])
        self.loads += 1
        return Response()

    async def unload(self, request: Request) -> Response:
        self.adapters.discard((await request.json())["lora_name"])
        return Response()

    async def complete(self, request: Request) -> Response:
        """Also the controller's probe."""
        body = await request.json()
        self.priorities.add(body.get("priority"))
        if body["model"] not in {self.base, *self.adapters}:
            return self._unknown(body["model"])
        value = -0.5 if body["model"] == self.base else -0.75
        logprobs = {"tokens": ["x"], "token_logprobs": [value], "top_logprobs": [{"x": value}]}
        choice = {
            "index": 0,
            "text": f"{body['model']} completes",
            "logprobs": logprobs,
            "finish_reason": "stop",
        }
        return JSONResponse(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
            }
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.refuse is not None:
            headers = {"retry-after": self.retry_after} if self.retry_after else None
            return JSONResponse(self.refuse[1], self.refuse[0], headers)
        if body["model"] not in {self.base, *self.adapters}:
            return self._unknown(body["model"])
        if body["model"] in self.broken:
            return JSONResponse({"error": {"message": "out of order", "code": 500}}, 500)
        if body["model"] in self.full:
            return JSONResponse({"error": {"message": "full", "code": 429}}, 429)
        await asyncio.sleep(self.delays.get(body["model"], 0.0))
        while self.mute.is_set():
            if await request.is_disconnected():
                self.abandoned.set()
                return Response(status_code=499)
            await asyncio.sleep(0.01)
        if body.get("stream"):
            return StreamingResponse(self._events(body["model"]), media_type="text/event-stream")
        if self.break_off:
            self.break_off -= 1
            raise ConnectionError("broken off")
        while not self.gate.is_set():
            if await request.is_disconnected():
                self.abandoned.set()
                return Response(status_code=499)
            await asyncio.sleep(0.01)
        content = "".join(WORDS).replace("<model>", body["model"])
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return JSONResponse(
            {
                "id": "chat-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
            }
        )

    async def _events(self, model: str) -> AsyncIterator[str]:
        if self.empty:
            self.empty -= 1
            return
        if self.error is not None:
            yield f"data: {json.dumps({'error': self.error})}\n\ndata: [DONE]\n\n"
            return
        try:
            for number, word in enumerate(WORDS):
                choice = {
                    "index": 0,
                    "delta": {"content": word.replace("<model>", model)},
                    "finish_reason": None,
                }
                chunk = {
                    "id": "chat-1",
                    "object": "chat.completion.chunk",
                    "created": 1,
                    "model": model,
                    "choices": [choice],
                }
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                if number == 0 and self.break_off:
                    self.break_off -= 1
                    raise ConnectionError("broken off")
                while not self.gate.is_set():
                    await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.abandoned.set()
            raise

    def _unknown(self, model: str) -> Response:
        error = {
            "message": f"The model `{model}` does not exist.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
        return JSONResponse({"error": error}, 404)
