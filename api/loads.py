"""Versions that requests name and no engine holds: each is loaded once for all that wait for it, and nobody
waits for ever."""

import asyncio
from collections import defaultdict

from anyio import CapacityLimiter, to_thread

from domain.errors import EngineUnavailable
from registry.serving import Wanted
from serving.controller import SwapController

LOADS_PER_ENGINE = 4
"""Threads that load for the engines of one base at the same time; most of them wait for their turn at one.
They are not those of the routes, and slow engines take none from the others."""
PATIENCE_SECONDS = 30.0
"""Of a request. The load goes on, for whoever asks again."""
AGAIN_SECONDS = 5.0


class Loads:
    """For the event loop alone: no locks."""

    def __init__(self, controller: SwapController) -> None:
        self._controller = controller
        self._under_way: dict[str, asyncio.Task[None]] = {}
        """By version id."""
        self._threads: defaultdict[str, CapacityLimiter] = defaultdict(
            lambda: CapacityLimiter(LOADS_PER_ENGINE)
        )
        """By what the engines run."""

    async def ensure(self, wanted: Wanted) -> None:
        """Wait until the version answers under its number.

        Raises EngineUnavailable, also after PATIENCE_SECONDS; CorruptArtifact, LedgerError.
        """
        load = self._under_way.get(wanted.version_id)
        if load is None:
            load = self._under_way[wanted.version_id] = asyncio.create_task(self._load(wanted))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                # The load is not this request's alone, nor could its thread be ended.
                await asyncio.shield(load)
        except TimeoutError:
            late = EngineUnavailable(
                f"'{wanted.assistant_name}@v{wanted.number}' is still being loaded after "
                f"{PATIENCE_SECONDS:g} s; try again shortly."
            )
            late.retry_after_seconds = AGAIN_SECONDS
            raise late from None

    async def _load(self, wanted: Wanted) -> None:
        try:
            await to_thread.run_sync(
                self._controller.ensure_loaded, wanted, limiter=self._threads[wanted.engine_base]
            )
        finally:
            del self._under_way[wanted.version_id]
