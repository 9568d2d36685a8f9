"""What is wanted, what the engines hold, and what therefore answers: the swap controller's memory.

The aliases are intent, the route table is fact (docs/decisions/0001): `flip` makes this follow that.
"""

import logging
import threading
import time
from collections.abc import Sequence

from domain.errors import EngineUnavailable
from serving.demands import Demands
from serving.replica import OTHER_MODEL, KnownReplica, Replica, WantedVersion
from serving.routes import Endpoint, Route, Routes, RouteTable

logger = logging.getLogger(__name__)

ASKED_SECONDS = 120.0
"""How long a version that a request named keeps its checkpoint asked for, unless it is brought up before: an
engine's start takes minutes."""

AliasId = tuple[str, str]
"""(assistant id, alias)."""


class Fleet:
    """Everything here is guarded by `lock`: public methods take it, those that say so want it held. The route
    table's own lock may be taken inside."""

    def __init__(self, routes: RouteTable, demands: Demands, priorities: bool) -> None:
        """`priorities`: the engines take them (EngineClient)."""
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """Notified after every flip."""
        self.routes = routes
        self.replicas: dict[tuple[str, str], Replica] = {}
        """By (url, base model)."""
        self._demands = demands
        self._priorities = priorities
        self._wanted: dict[AliasId, WantedVersion] = {}
        self._serving: dict[AliasId, WantedVersion] = {}
        """What answers for an alias now: the wanted version, or the one before it."""
        self._loaded: dict[str, WantedVersion] = {}
        """Every version that some replica acknowledges, by id."""
        self._asked: dict[str, float] = {}
        """Checkpoints that requests for a version by its number need, and until when (time.monotonic)."""

    def want(self, wanted: Sequence[WantedVersion], known: Sequence[KnownReplica]) -> None:
        """From now on the aliases want these, and these engines are there."""
        with self.lock:
            self._wanted = {(version.assistant_id, version.alias): version for version in wanted}
            before, self.replicas = self.replicas, {}
            for one in known:
                key = (one.url, one.base_model)
                replica = before.get(key)
                if replica is None or replica.model_name != one.model_name:
                    replica = Replica(one, self._priorities)
                self.replicas[key] = replica
            gone = set(before.values()) - set(self.replicas.values())
        for replica in gone:
            replica.forget()

    def mistaken(self) -> set[str]:
        """Urls of the engines that run something else than they are known for."""
        with self.lock:
            return {
                one.url
                for one in self.replicas.values()
                if one.unreachable is not None and one.unreachable.code == OTHER_MODEL
            }

    def resume(self, served: Sequence[WantedVersion], wanted: Sequence[WantedVersion]) -> None:
        """What answered when the last controller ended answers until something else does."""
        keys = {(version.assistant_id, version.alias) for version in wanted}
        with self.lock:
            for version in served:
                key = (version.assistant_id, version.alias)
                if key in keys:
                    self._serving.setdefault(key, version)

    def flip(self) -> None:
        """Route every alias to its wanted version where a replica acknowledges that, else leave it."""
        with self.changed:
            self._flip()

    def _flip(self) -> None:
        """With `lock` held."""
        aliases = {}
        for key, wanted in self._wanted.items():
            before = self._serving.get(key)
            chosen = wanted
            route = self._route(wanted)
            if route is None and before is not None:
                chosen, route = before, self._route(before)
            if route is None:
                continue
            if before is None or before.version_id != chosen.version_id:
                logger.info("%s@%s -> v%d", wanted.assistant_name, wanted.alias, chosen.number)
            self._serving[key] = chosen
            aliases[wanted.team_id, wanted.assistant_name, wanted.alias] = route
        for key in self._serving.keys() - self._wanted.keys():
            del self._serving[key]
        versions = {}
        for version in list(self._loaded.values()):
            route = self._route(version)
            if route is None:
                del self._loaded[version.version_id]
            else:
                versions[version.team_id, version.assistant_name, version.number] = route
        self.routes.replace(Routes(aliases, versions))
        self.changed.notify_all()

    def wait_serving(self, assistant_id: str, alias: str, version_id: str, timeout: float) -> bool:
        """Whether the version answers for the alias within `timeout` seconds."""

        def serving() -> bool:
            version = self._serving.get((assistant_id, alias))
            return (
                version is not None and version.version_id == version_id and self._route(version) is not None
            )

        with self.changed:
            return self.changed.wait_for(serving, timeout)

    def acknowledge(self, replica: Replica, version: WantedVersion) -> None:
        """The replica has answered a probe as `version`, and is routed to from the moment that anybody who
        asks what serves is told so."""
        name = replica.engine_model(version)
        with self.changed:
            replica.acknowledged.add(name)
            replica.failures.pop(name, None)
            self._loaded[version.version_id] = version
            self._asked.pop(version.checkpoint_id or "", None)
            self.routes.touch(replica.endpoint(version))
            self._flip()

    def release_idle_checkpoint(self, replica: Replica, idle_seconds: float) -> None:
        """A replica that runs a full version which nothing wants, nobody holds and nobody used for so long
        acknowledges it no more."""
        with self.lock:
            runs_checkpoint = any(v.checkpoint_id == replica.base_model for v in self._loaded.values())
            answers_for_it_alone = replica.acknowledged == {replica.model_name}
            if not runs_checkpoint or not answers_for_it_alone or self.needed(replica):
                return
            if self.routes.retire(Endpoint(replica.url, replica.model_name), idle_seconds):
                replica.acknowledged.clear()
                logger.info("%s on %s is needed no more", replica.model_name, replica.url)

    def ask_for(self, checkpoint_id: str) -> None:
        """A request needs an engine of this full version."""
        with self.lock:
            self._asked[checkpoint_id] = time.monotonic() + ASKED_SECONDS

    def checkpoints(self, wanted: Sequence[WantedVersion]) -> set[str]:
        """The full versions whose engines must run."""
        with self.lock:
            now = time.monotonic()
            self._asked = {id: until for id, until in self._asked.items() if until > now}
            used = [*wanted, *self._serving.values(), *self._loaded.values()]
            return {version.checkpoint_id for version in used if version.checkpoint_id} | self._asked.keys()

    def states(self) -> dict[AliasId, tuple[str | None, str | None]]:
        """By alias: id of the version that answers for it, what keeps the wanted one from an engine."""
        with self.lock:
            return {key: self._state(key, wanted) for key, wanted in self._wanted.items()}

    def needed(self, replica: Replica) -> list[WantedVersion]:
        """What the replica must hold: the wanted versions, and those that still answer in their stead.
        With `lock` held."""
        versions = [*self._wanted.values(), *self._serving.values()]
        return [version for version in versions if version.engine_base == replica.base_model]

    def behind(self, replica: Replica) -> bool:
        """Whether there is something to load right now. With `lock` held."""
        return replica.unreachable is None and any(
            name not in replica.acknowledged and replica.waiting(name) is None
            for name in map(replica.engine_model, self.needed(replica))
        )

    def candidates(self, version: WantedVersion) -> list[Replica]:
        """The replicas that could answer for it. With `lock` held."""
        return [one for one in self.replicas.values() if one.base_model == version.engine_base]

    def no_engine(self, wanted: WantedVersion) -> EngineUnavailable:
        """Why there is no candidate."""
        name = f"{wanted.assistant_name}@v{wanted.number}"
        if wanted.checkpoint_id is None:
            told = f"No inference engine is registered for the base model '{wanted.base_model}'."
        elif problem := self._demands.problems.get(wanted.checkpoint_id):
            told = f"No inference engine runs the checkpoint of '{name}': {problem}"
        else:
            told = f"An inference engine for the checkpoint of '{name}' is starting; try again shortly."
        return EngineUnavailable(told)

    def _route(self, version: WantedVersion) -> Route | None:
        """The replicas that acknowledge the version; those that don't answer only if no other does."""
        able = [
            replica
            for replica in self.candidates(version)
            if replica.engine_model(version) in replica.acknowledged
        ]
        chosen = [replica for replica in able if replica.unreachable is None] or able
        endpoints = tuple(replica.endpoint(version) for replica in chosen)
        return Route(version.version_id, version.number, endpoints) if endpoints else None

    def _state(self, key: AliasId, wanted: WantedVersion) -> tuple[str | None, str | None]:
        serving = self._serving.get(key)
        if serving is not None and self._route(serving) is None:
            serving = None
        answers = serving is not None and serving.version_id == wanted.version_id
        errors = []
        for replica in self.candidates(wanted):
            failure = replica.failures.get(replica.engine_model(wanted))
            if failure is not None:
                errors.append(failure.error.message)
            elif replica.unreachable is not None and not answers:
                errors.append(replica.unreachable.message)
        if not self.candidates(wanted):
            errors.append(self.no_engine(wanted).message)
        return serving.version_id if serving is not None else None, "; ".join(errors) or None
