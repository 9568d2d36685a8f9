"""From the compute thread to a request's coroutine: its sequences, their news, their end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from fastapi import Request

from engine.scheduler import Scheduler
from engine.sequence import Failure, Output, Sequence, share_prompts


class ClientGone(Exception):
    """The client closed the connection before its reply was complete."""


class Inbox:
    """The open sequences of one request. Leaving the context aborts what is not finished."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Output | Failure] = asyncio.Queue()
        self.sequences: list[Sequence] = []

    def listener(self, news: Output | Failure) -> None:
        """Called on the compute thread."""
        # A closed loop means that the process is going down and nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def submit(self, sequences: list[Sequence]) -> None:
        """Raises Overloaded while the engine is stopping."""
        self.sequences = sequences
        share_prompts(sequences)
        self._scheduler.submit(sequences)

    async def outputs(self) -> AsyncIterator[Output]:
        """News until every sequence has finished. Raises EngineError when one fails."""
        open_sequences = len(self.sequences)
        while open_sequences:
            news = await self._news.get()
            if isinstance(news, Failure):
                raise news.error
            if news.finish_reason is not None:
                open_sequences -= 1
            yield news

    async def finished(self, request: Request) -> list[Output]:
        """The outputs by index, for sequences that do not stream.

        Raises EngineError when one fails and ClientGone when the client does not wait for it.
        """
        collecting = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientGone
            return collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()

    async def _collect(self) -> list[Output]:
        return sorted([output async for output in self.outputs()], key=lambda output: output.index)

    def __enter__(self) -> "Inbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(one.finish_reason is None for one in self.sequences):
            self._scheduler.abort(self.sequences)


async def _disconnected(receive: Callable[[], object]) -> None:
    while True:
        message = await receive()  # type: ignore[misc]
        if message["type"] == "http.disconnect":
            return
