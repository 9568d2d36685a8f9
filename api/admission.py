"""How many completions may be under way at once, and who waits a moment for a place.

Counted in this process alone and on its event loop alone: no locks.
"""

import asyncio
from collections import Counter, deque

from domain.errors import Overloaded

AssistantKey = tuple[str, str]
"""Team id and name of an assistant."""


class Place:
    """One completion's place, held until released."""

    def __init__(self, admission: "Admission", assistant: AssistantKey) -> None:
        self._admission: Admission | None = admission
        self._assistant = assistant

    def release(self) -> None:
        """Idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._leave(self._assistant)


class Admission:
    """At most `places` in all and `places_per_assistant` of one assistant. Of those that find none, `queue`
    wait up to `queue_seconds`, first come first served among those whose assistant may enter."""

    def __init__(self, *, places: int, places_per_assistant: int, queue: int, queue_seconds: float) -> None:
        self._places = places
        self._places_per_assistant = places_per_assistant
        self._queue = queue
        self._queue_seconds = queue_seconds
        self._held: Counter[AssistantKey] = Counter()
        self._waiting: deque[tuple[AssistantKey, asyncio.Future[None]]] = deque()

    @property
    def under_way(self) -> int:
        return self._held.total()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter_now(self, assistant: AssistantKey) -> Place | None:
        """None when there is no place at once."""
        if not self._may_enter(assistant):
            return None
        self._held[assistant] += 1
        return Place(self, assistant)

    async def enter(self, assistant: AssistantKey) -> Place:
        """Raises Overloaded."""
        place = self.enter_now(assistant)
        if place is not None:
            return place
        if len(self._waiting) >= self._queue:
            raise Overloaded(f"Too many requests are under way ({self.under_way}); try again shortly.")
        turn = asyncio.get_running_loop().create_future()
        entry = (assistant, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(self._queue_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the place came in the same moment
                self._leave(assistant)
            else:
                self._waiting.remove(entry)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"No place became free within {self._queue_seconds:g} s; try again shortly."
                ) from None
            raise
        return Place(self, assistant)

    def _may_enter(self, assistant: AssistantKey) -> bool:
        return self.under_way < self._places and self._held[assistant] < self._places_per_assistant

    def _leave(self, assistant: AssistantKey) -> None:
        self._held[assistant] -= 1
        if not self._held[assistant]:
            del self._held[assistant]
        while (entry := self._next()) is not None:
            self._waiting.remove(entry)
            self._held[entry[0]] += 1
            entry[1].set_result(None)

    def _next(self) -> tuple[AssistantKey, asyncio.Future[None]] | None:
        """The first who may enter; one that was cancelled leaves the queue by itself."""
        for entry in self._waiting:
            if not entry[1].done() and self._may_enter(entry[0]):
                return entry
        return None
