"""Clients that stream chat completions without a pause, and what each reply was."""

import asyncio
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from benchmarks.serving_versions import QUESTIONS

PATIENCE_SECONDS = 60.0
"""Past this a request hangs."""


@dataclass(frozen=True)
class Reply:
    asked_at: float
    """time.monotonic, as all times here."""
    first_token_at: float | None
    ended_at: float
    version: str | None
    """`x-model-version`; None from an engine."""
    text: str
    tokens: int
    """Events with content; the engines send one for each token."""
    problem: str | None
    """What went wrong: an HTTP status, an error event, `hangs`, or how the connection broke."""
    clean: bool
    """Whole, or an error in OpenAI's shape: something that a client can act on."""


async def ask(client: httpx.AsyncClient, model: str, question: str, max_tokens: int) -> Reply:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    asked_at = time.monotonic()
    first: float | None = None
    version, parts, problem, clean, done = None, list[str](), None, True, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            version = response.headers.get("x-model-version")
            if response.status_code != 200:
                content = await response.aread()
                problem, clean = f"HTTP {response.status_code}", b'"error"' in content
            else:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data:"):
                        event = json.loads(line[5:])
                        if "error" in event:
                            problem = f"error event: {event['error']['code']}"
                        for choice in event.get("choices", []):
                            if choice["delta"].get("content"):
                                first = first or time.monotonic()
                                parts.append(choice["delta"]["content"])
                if problem is None and not done:
                    problem, clean = "the stream ended early", False
    except httpx.TimeoutException:
        problem, clean = "hangs", False
    except httpx.HTTPError as error:
        problem, clean = type(error).__name__, False
    return Reply(asked_at, first, time.monotonic(), version, "".join(parts), len(parts), problem, clean)


class Streams:
    """A context manager: `clients` of them ask `models` in turn inside the block, each again as soon as it
    was answered, and each at least once."""

    def __init__(self, url: str, models: Sequence[str], clients: int, max_tokens: int = 12) -> None:
        self.replies: list[Reply] = []
        self._url = url
        self._models = models
        self._clients = clients
        self._max_tokens = max_tokens
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="streams")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def await_reply(
        self, wanted: Callable[[Reply], bool], seconds: float, since: int | None = None
    ) -> Reply | None:
        """The first such reply that ends from now on, or after the first `since` of all; None when there is
        none in time."""
        seen, until = len(self.replies) if since is None else since, time.monotonic() + seconds
        while time.monotonic() < until:
            for reply in self.replies[seen:]:
                seen += 1
                if wanted(reply):
                    return reply
            time.sleep(0.01)
        return None

    async def _run(self) -> None:
        timeout = httpx.Timeout(PATIENCE_SECONDS)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=timeout, limits=limits, trust_env=False
        ) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(self._clients)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        turn = number
        while turn == number or not self._stopping.is_set():
            model = self._models[turn % len(self._models)]
            reply = await ask(client, model, QUESTIONS[turn % len(QUESTIONS)], self._max_tokens)
            self.replies.append(reply)
            turn += 1
            if reply.problem is not None:
                await asyncio.sleep(0.1)


def ask_alone(url: str, model: str, max_tokens: int = 1) -> Reply:
    """One stream of a client of its own."""

    async def asked() -> Reply:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            return await ask(client, model, QUESTIONS[0], max_tokens)

    return asyncio.run(asked())


async def in_turn(
    ways: Mapping[str, tuple[str, str]],
    max_tokens: int,
    *,
    turns: int = sys.maxsize,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds to the first token by way, each (url, model): one client that asks every way once in each turn,
    in random order, so that what else the machine does meets all of them.

    The first turn opens connections and is left out. Raises RuntimeError when a reply fails.
    """
    first: dict[str, list[float]] = {way: [] for way in ways}
    dice, until = random.Random(1), time.monotonic() + seconds
    async with AsyncExitStack() as running:
        clients = {
            way: await running.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False)
            )
            for way, (url, _) in ways.items()
        }
        for turn in range(turns + 1):
            if time.monotonic() > until:
                break
            for way in dice.sample(list(ways), len(ways)):
                reply = await ask(clients[way], ways[way][1], QUESTIONS[0], max_tokens)
                if reply.problem is not None or reply.first_token_at is None:
                    raise RuntimeError(f"{way}: {reply.problem or 'no token'}")
                if turn:
                    first[way].append(reply.first_token_at - reply.asked_at)
    return first


def stream_for(
    url: str, models: Sequence[str], clients: int, seconds: float, max_tokens: int
) -> tuple[list[Reply], float]:
    """Replies of so many seconds, and how long it took until the last one had ended."""
    began = time.monotonic()
    with Streams(url, models, clients, max_tokens) as streams:
        time.sleep(seconds)
    return streams.replies, time.monotonic() - began
