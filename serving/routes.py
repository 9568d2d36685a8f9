"""Which engine answers for which model name, and who is using it at the moment.

The table is an immutable snapshot that the swap controller replaces as a whole; a lease counts one
request's use of one model of one engine, so that nothing is unloaded under a request in flight.
"""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from domain.errors import EngineUnavailable
from domain.version import ModelName

SUSPECT_SECONDS = 2.0
NOT_ROUTED = "not_routed"
"""Code of the EngineUnavailable that `lease` raises: the model is unknown here or not loaded (yet)."""


@dataclass(frozen=True)
class Endpoint:
    """One model of one engine."""

    url: str
    engine_model: str


@dataclass(frozen=True)
class Route:
    """A version and the endpoints that have acknowledged it; at least one."""

    version_id: str
    version_number: int
    endpoints: tuple[Endpoint, ...]


AliasKey = tuple[str, str, str]
"""Team id, assistant name, alias."""
VersionKey = tuple[str, str, int]
"""Team id, assistant name, version number."""


@dataclass(frozen=True)
class Routes:
    aliases: Mapping[AliasKey, Route] = field(default_factory=dict)
    versions: Mapping[VersionKey, Route] = field(default_factory=dict)
    """Every loaded version, aliased or not."""


class Lease:
    """One request's hold on an endpoint. Also a context manager."""

    def __init__(self, table: "RouteTable", endpoint: Endpoint, route: Route) -> None:
        self.url = endpoint.url
        self.engine_model = endpoint.engine_model
        self.version_id = route.version_id
        self.version_number = route.version_number
        self.replicas = len(route.endpoints)
        """Engines that could have answered."""
        self._endpoint = endpoint
        self._table: RouteTable | None = table
        self._lock = threading.Lock()

    def release(self) -> None:
        """Idempotent."""
        with self._lock:
            table, self._table = self._table, None
        if table is not None:
            table._release(self._endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class RouteTable:
    """Thread-safe; `lease` never waits for anything but a few lines of another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._routes = Routes()
        self._leases: Counter[Endpoint] = Counter()
        self._busy: Counter[str] = Counter()
        """Leases by engine url, over all of its models."""
        self._suspect: dict[str, float] = {}
        """Engines that just gave no reply, and until when others are preferred (time.monotonic)."""
        self._used: dict[Endpoint, float] = {}
        """When an endpoint was last leased, released or loaded (time.monotonic)."""
        self._turn = itertools.count()

    @property
    def routes(self) -> Routes:
        return self._routes

    def lease(self, team_id: str, model: ModelName, avoid: Container[str] = ()) -> Lease:
        """An endpoint that answers for `model`, held until released; of several the one whose engine has
        the fewest leases. An engine in `avoid`, by url, or that just gave no reply is the last choice.

        Raises EngineUnavailable (code `not_routed`).
        """
        with self._lock:
            if model.version is not None:
                route = self._routes.versions.get((team_id, model.assistant, model.version))
            else:
                route = self._routes.aliases.get((team_id, model.assistant, model.alias or ""))
            if route is None:
                reference = model.alias if model.version is None else f"v{model.version}"
                raise EngineUnavailable(
                    f"'{model.assistant}@{reference}' is not loaded on any inference engine.",
                    code=NOT_ROUTED,
                )
            endpoint = self._least_busy(route.endpoints, avoid)
            self._leases[endpoint] += 1
            self._busy[endpoint.url] += 1
            self._used[endpoint] = time.monotonic()
            return Lease(self, endpoint, route)

    def suspect(self, url: str) -> None:
        """The engine gave no reply: for a moment, prefer others. The controller finds out what is wrong."""
        with self._lock:
            self._suspect[url] = time.monotonic() + SUSPECT_SECONDS

    def trust(self, url: str) -> None:
        """The engine has replied."""
        if url in self._suspect:
            with self._lock:
                self._suspect.pop(url, None)

    def busy(self, url: str) -> int:
        """Requests that use the engine now, whichever of its models."""
        with self._lock:
            return self._busy[url]

    def leases(self, endpoint: Endpoint) -> int:
        """Requests that use the endpoint now."""
        with self._lock:
            return self._leases[endpoint]

    def replace(self, routes: Routes) -> None:
        """From now on `lease` sees `routes`, all of it; leases that are held stay."""
        with self._lock:
            self._routes = routes

    def touch(self, endpoint: Endpoint) -> None:
        """Count the endpoint as used now: it was loaded because somebody is about to use it."""
        with self._lock:
            self._used[endpoint] = time.monotonic()

    def last_used(self, endpoint: Endpoint) -> float:
        """When it was last leased, released or loaded (time.monotonic); minus infinity when it never was."""
        with self._lock:
            return self._used.get(endpoint, -math.inf)

    def retire(self, endpoint: Endpoint, idle_seconds: float) -> bool:
        """True when no alias leads to the endpoint, nobody holds it, and nobody did for `idle_seconds`;
        from then on nobody can lease it, so it may be unloaded."""
        with self._lock:
            now = time.monotonic()
            idle = now - self._used.setdefault(endpoint, now)
            aliased = any(endpoint in route.endpoints for route in self._routes.aliases.values())
            if aliased or self._leases[endpoint] or idle < idle_seconds:
                return False
            self._routes = Routes(self._routes.aliases, dict(_without(self._routes.versions, endpoint)))
            del self._used[endpoint], self._leases[endpoint]
            return True

    def _least_busy(self, endpoints: tuple[Endpoint, ...], avoid: Container[str]) -> Endpoint:
        """With _lock held. Equals take turns."""
        if len(endpoints) == 1:
            return endpoints[0]
        now, first = time.monotonic(), next(self._turn) % len(endpoints)

        def rank(endpoint: Endpoint) -> tuple[bool, int]:
            shunned = endpoint.url in avoid or self._suspect.get(endpoint.url, now) > now
            return shunned, self._busy[endpoint.url]

        return min(endpoints[first:] + endpoints[:first], key=rank)

    def _release(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._leases[endpoint] -= 1
            self._busy[endpoint.url] -= 1
            self._used[endpoint] = time.monotonic()


def _without(routes: Mapping[VersionKey, Route], endpoint: Endpoint) -> Iterable[tuple[VersionKey, Route]]:
    for key, route in routes.items():
        left = tuple(known for known in route.endpoints if known != endpoint)
        if left:
            yield key, Route(route.version_id, route.version_number, left)
