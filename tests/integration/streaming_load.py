"""Clients that stream from the gateway without a pause, and which version each reply really came from."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

SAME = 0.2
"""Two computations of one log-probability in bfloat16, in batches of any shape, differ by less (nats)."""
PAUSE_SECONDS = 0.2
"""Between two requests of a client: trainer, engines and clients share a few cores."""


class Refused(Exception):
    """A 503, or a stream that an error event ended: no answer, but a clear word."""


@dataclass(frozen=True)
class Reply:
    version: str
    """As `x-model-version` has it."""
    tokens: tuple[tuple[str, float], ...]
    """(token, log-probability) of a greedy answer."""

    def is_like(self, other: "Reply") -> bool:
        """Whether one model may have given both. At a near-tie two greedy answers of one model may part."""
        for (token, logprob), (others, expected) in zip(self.tokens, other.tokens, strict=False):
            if abs(logprob - expected) > SAME:
                return False
            if token != others:
                return True
        return len(self.tokens) == len(other.tokens)


def ask(client: httpx.Client, model: str) -> Reply:
    """A whole greedy answer, streamed. Raises Refused; AssertionError for anything else than an answer."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "stream": True,
    }
    tokens: list[tuple[str, float]] = []
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code == 503:
            raise Refused(json.loads(reply.read())["error"]["message"])
        assert reply.status_code == 200, reply.read().decode()
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    for event in events:
        if event == "[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise Refused(chunk["error"]["message"])
        for choice in chunk["choices"]:
            told = (choice.get("logprobs") or {}).get("content") or []
            tokens += [(one["token"], one["logprob"]) for one in told]
    assert events[-1:] == ["[DONE]"], "the stream broke off"
    assert tokens
    return Reply(reply.headers["x-model-version"], tuple(tokens))


class StreamingLoad:
    """A context manager: the clients ask for `model` inside its block."""

    def __init__(self, url: str, model: str, clients: int = 2) -> None:
        self.replies: list[Reply] = []
        self.refusals: list[str] = []
        self.failures: list[str] = []
        """Everything that is neither a whole answer nor a clear refusal."""
        self._url, self._model = url, model
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def foreign(self, quiet: Mapping[str, Reply]) -> list[Reply]:
        """Replies that are not what their version alone, of those in `quiet`, says."""
        return [
            reply
            for reply in self.replies
            if [name for name, expected in quiet.items() if reply.is_like(expected)] != [reply.version]
        ]

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._ended.is_set():
                try:
                    self.replies.append(ask(client, self._model))
                except Refused as error:
                    self.refusals.append(str(error))
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self._ended.wait(PAUSE_SECONDS)
