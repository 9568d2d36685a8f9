"""Shadow traffic: a champion's request is asked of another version too, in the background.

Its reply is compared and forgotten; sums are all that stays. It is sent once the champion's reply is whole,
holds no place, and is dropped or broken off when there is other work to do.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from fastapi.concurrency import run_in_threadpool

from api.admission import Admission
from api.traffic import TrafficControl
from api.transcript import Transcript
from api.upstream import Patience, Upstream, attempt
from domain.errors import EngineUnavailable
from domain.grading import grade
from domain.rouge import rouge_l
from domain.settings import Settings
from domain.skill import Grader
from domain.version import ModelName
from registry.traffic import Plan
from serving.routes import Lease, RouteTable

logger = logging.getLogger(__name__)

_NO_ROOM = frozenset({429, 503})


@dataclass(frozen=True)
class Mirrored:
    """A champion's request that was answered."""

    plan: Plan
    alias: str
    """Of the version that is to be asked as well."""
    path: str
    payload: dict[str, Any]
    request_id: str
    answer: str


@dataclass(frozen=True)
class Agreement:
    identical: bool
    rouge_l: float
    grade: float | None
    """By the skill's grader; None without one, or without an answer to grade by."""


class Shadows:
    """On the event loop alone."""

    def __init__(
        self,
        engines: aiohttp.ClientSession,
        routes: RouteTable,
        control: TrafficControl,
        admission: Admission,
        settings: Settings,
    ) -> None:
        self._engines = engines
        self._routes = routes
        self._control = control
        self._admission = admission
        self._patience = Patience.from_settings(settings)
        self._most = settings.shadow_requests
        self._busy = settings.shadow_engine_requests
        self._tasks: set[asyncio.Task[None]] = set()

    def mirror(self, one: Mirrored) -> None:
        """Ask the shadow, if there is room; never waits."""
        try:
            lease = self._routes.lease(one.plan.team_id, ModelName(one.plan.assistant_name, one.alias, None))
        except EngineUnavailable:
            return  # not loaded: nothing to compare with
        crowded = len(self._tasks) >= self._most or self._routes.busy(lease.url) > self._busy
        if crowded or self._admission.waiting:
            self._control.dropped(one.plan, lease)
            lease.release()
            return
        task = asyncio.create_task(self._ask(one, lease))
        self._tasks.add(task)
        # One that is cancelled before its first step never comes to any line of `_ask`.
        task.add_done_callback(lambda ended: self._ended(ended, one.plan, lease))

    def give_way(self) -> None:
        """Somebody waits for a place: break off what is under way."""
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        self.give_way()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, one: Mirrored, lease: Lease) -> None:
        started_at = time.perf_counter()
        try:
            upstream = await attempt(
                self._engines, lease, one.path, one.payload, f"{one.request_id}-shadow", self._patience
            )
        except (EngineUnavailable, aiohttp.ClientError) as error:
            logger.warning("shadow %s: %s", lease.engine_model, error)
            self._control.count(one.plan, "shadow", lease, None)
            return
        latency = time.perf_counter() - started_at
        try:
            await self._compare(one, lease, upstream, latency)
        finally:
            upstream.close()

    def _ended(self, task: asyncio.Task[None], plan: Plan, lease: Lease) -> None:
        self._tasks.discard(task)
        lease.release()
        if task.cancelled():
            self._control.dropped(plan, lease)

    async def _compare(self, one: Mirrored, lease: Lease, upstream: Upstream, latency: float) -> None:
        status = upstream.status
        if status in _NO_ROOM:
            self._control.dropped(one.plan, lease)
            return
        transcript = Transcript()
        try:
            if not upstream.succeeded:
                raise EngineUnavailable(f"HTTP {status}")
            await transcript.add_upstream(upstream, streamed=bool(one.payload.get("stream")))
        except EngineUnavailable as error:
            logger.warning("shadow %s: %s", lease.engine_model, error)
            self._control.count(one.plan, "shadow", lease, None)
            return
        text = transcript.text()
        found = None if text is None else await run_in_threadpool(compare, one.plan.grader, text, one.answer)
        figures = self._control.count(one.plan, "shadow", lease, latency)
        if found is None:
            return
        figures.compared += 1
        figures.identical += found.identical
        figures.rouge_l += found.rouge_l
        if found.grade is not None:
            figures.graded += 1
            figures.agreed += found.grade


def compare(grader: Grader | None, reply: str, answer: str) -> Agreement:
    """The shadow's reply against the champion's."""
    score = None if grader is None or not answer.strip() else grade(grader, reply, answer)
    return Agreement(reply.strip() == answer.strip(), rouge_l(reply, answer), score)
