"""A client that keeps chatting while versions change under it, and counts what went wrong."""

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

from cli.client import Client
from cli.errors import CliError

PROMPTS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "How many days does a week have?",
    "Give me a short greeting for a colleague.",
    "What do bees make?",
    "Explain in one sentence why the sky looks blue.",
)
EVERY_SECONDS = 3.0
MAX_TOKENS = 12
"""Short, since answering takes the cores that training wants."""


class BackgroundChat:
    """One request about every three seconds from entering to leaving; each must succeed."""

    def __init__(self, client: Client, model: str) -> None:
        self.replies: Counter[str] = Counter()
        """Answers by the version that gave them."""
        self.failures: list[str] = []
        self.slowest_seconds = 0.0
        self._client = client
        self._model = model
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background-chat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=150)  # above the client's own timeout

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            started = time.monotonic()
            self._ask(PROMPTS[number % len(PROMPTS)], stream=number % 3 == 2)
            number += 1
            spent = time.monotonic() - started
            self.slowest_seconds = max(self.slowest_seconds, spent)
            self._ended.wait(max(0.1, EVERY_SECONDS - spent))

    def _ask(self, prompt: str, stream: bool) -> None:
        messages = [{"role": "user", "content": prompt}]
        ask = self._client.chat_streamed if stream else self._client.chat
        try:
            reply = ask(self._model, messages, max_tokens=MAX_TOKENS)
        except CliError as error:
            self.failures.append(f"{time.strftime('%H:%M:%S')} {prompt!r}: {error}")
            return
        if reply.version is None:
            self.failures.append(f"{time.strftime('%H:%M:%S')} {prompt!r}: no x-model-version in the reply")
        else:
            self.replies[reply.version] += 1
