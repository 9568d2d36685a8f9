"""One completion from its place in the line to its figures: which version answers it, and how that went."""

import logging
import time
from collections.abc import Set
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from api.admission import Place
from api.context import Context
from api.routes.models import model_not_found
from api.shadow import Mirrored
from api.traffic import Side
from api.transcript import Transcript
from api.upstream import Upstream, open_upstream, unless_disconnected
from domain.errors import EngineUnavailable, NotFound
from domain.version import CHAMPION, ModelName
from registry import aliases, assistants, versions
from registry.serving import Wanted, wanted_version
from registry.session import LedgerError
from serving.routes import NOT_ROUTED, Lease

logger = logging.getLogger(__name__)

_FAILURES = (502, 503, 504)


class Call:
    """One completion: who answers it, and its figures in the metrics."""

    def __init__(self, request: Request, context: Context, team_id: str, path: str) -> None:
        """`path` is the engine's."""
        self.context = context
        self.team_id = team_id
        self._request = request
        self._path = path
        self._payload: dict[str, Any] = {}
        self.assistant = ""
        """Empty until the model is known to exist: labels of metrics must stay few."""
        self.version = ""
        self._started_at = time.perf_counter()
        self._place: Place | None = None
        self._side: Side | None = None
        self._lease: Lease | None = None
        self._asked_at = self._began_at = 0.0
        self.transcript: Transcript | None = None
        """Of a champion's reply that a shadow's is to be compared with."""

    def share_out(self, name: ModelName, user: str | None) -> ModelName:
        """What answers for a bare assistant's name: its champion, or for some users the canary."""
        self._side = self.context.traffic.choose(self.team_id, name.assistant, user)
        if self._side is None:
            return name
        if self._side.shadow is not None:
            self.transcript = Transcript()
        return ModelName(name.assistant, self._side.alias, None)

    async def open(self, name: ModelName, payload: dict[str, Any]) -> Upstream | None:
        """The engine's reply, once it begins; None when the client left before.

        Raises Overloaded, EngineTimeout, and whatever `lease` raises.
        """
        self._payload = payload
        if not await self._enter(name):
            return None
        upstream = await unless_disconnected(
            self._request.receive,
            open_upstream(
                self.context.engines,
                self.context.routes,
                lambda lost, avoid: self.lease(name, lost, avoid),
                self._path,
                payload,
                self._request.state.request_id,
                self.context.patience,
            ),
        )
        if upstream is not None:
            self._began_at = time.perf_counter()
            seconds = self._began_at - self._started_at
            self.context.metrics.gateway_first_byte_seconds.labels(self.assistant).observe(seconds)
        return upstream

    async def _enter(self, name: ModelName) -> bool:
        """Take a place among the completions under way, or wait for one; False when the client left
        meanwhile. Raises Overloaded."""
        admission, assistant = self.context.admission, (self.team_id, name.assistant)
        self._place = admission.enter_now(assistant)
        if self._place is None:
            if (*assistant, CHAMPION) in self.context.routes.routes.aliases:
                self.assistant = name.assistant
            self.context.shadows.give_way()
            self._place = await unless_disconnected(self._request.receive, admission.enter(assistant))
        self._asked_at = time.perf_counter()
        return self._place is not None

    async def lease(self, name: ModelName, lost: bool, avoid: Set[str]) -> Lease:
        """A version that answers for `name`, held until released, preferably not by an engine in `avoid`.

        The database is asked only for what is not routed: a version without an alias, which is loaded on
        demand, or one that its engine `lost`. Raises NotFound, EngineUnavailable, CorruptArtifact.
        """
        routes = self.context.routes
        lease = None
        if not lost:
            try:
                lease = routes.lease(self.team_id, name, avoid)
            except EngineUnavailable as error:
                if error.code != NOT_ROUTED:
                    raise
        if lease is None:
            number = await self._load(name)
            try:
                lease = routes.lease(self.team_id, ModelName(name.assistant, None, number), avoid)
            except EngineUnavailable as error:  # gone again in this moment
                raise EngineUnavailable(error.message) from error
        self.assistant, self.version = name.assistant, f"v{lease.version_number}"
        self._lease = lease
        return lease

    async def _load(self, name: ModelName) -> int:
        """Number of the version that `name` means, once it answers."""
        try:
            wanted = await run_in_threadpool(self._wanted, name)
            self.assistant = name.assistant
            await self.context.loads.ensure(wanted)
        except LedgerError as error:
            logger.warning("could not look up '%s': %s", _spelled(name), error)
            raise EngineUnavailable(
                f"'{_spelled(name)}' is not loaded, and the database that knows it does not answer; "
                "try again shortly."
            ) from error
        return wanted.number

    def _wanted(self, name: ModelName) -> Wanted:
        with self.context.reads() as session:
            try:
                number = _number(session, self.team_id, name)
                return wanted_version(session, self.team_id, name.assistant, number)
            except NotFound as error:
                raise model_not_found(_spelled(name)) from error

    def ended(self, status: int) -> None:
        """`status` is the reply's, or what it would have been had it not begun."""
        if self._place is not None:
            self._place.release()
        # What the client did wrong, or gave up, says nothing about the version.
        if self._side is not None and self._lease is not None and status in (200, *_FAILURES):
            latency = self._began_at - self._asked_at if status == 200 else None
            self.context.traffic.record(self._side, self._lease, latency)
            self._mirror(self._side, status)
        metrics = self.context.metrics
        metrics.gateway_requests.labels(self.assistant, self.version, str(status)).inc()
        metrics.gateway_seconds.labels(self.assistant).observe(time.perf_counter() - self._started_at)

    def _mirror(self, side: Side, status: int) -> None:
        request_id = self._request.state.request_id
        answer = None if self.transcript is None else self.transcript.text()
        if status == 200 and side.shadow is not None and answer is not None:
            self.context.shadows.mirror(
                Mirrored(side.plan, side.shadow, self._path, self._payload, request_id, answer)
            )


def _number(session: Session, team_id: str, name: ModelName) -> int:
    """Raises NotFound. An assistant's id is no model name."""
    if name.version is not None:
        return name.version
    assistant = assistants.get_assistant(session, team_id, name.assistant)
    alias = aliases.get_alias(session, assistant, name.alias or CHAMPION)
    return versions.get_version(session, assistant, alias.version_id).number


def _spelled(name: ModelName) -> str:
    if name.version is not None:
        return f"{name.assistant}@v{name.version}"
    return name.assistant if name.alias == CHAMPION else f"{name.assistant}@{name.alias}"
