"""The swap controller: makes the engines serve what the aliases say.

The aliases are intent, the route table is fact (docs/decisions/0001). Every `poll_seconds`, or when
nudged, the controller reads both sides and works each engine in a thread of its own, so that a slow one
holds up nobody: load what is missing (verified files, unique name), probe it, flip the route, and later
unload what no alias names, nobody holds and nobody used for `idle_seconds`. A version that can't be
loaded leaves the old route as it is.

A full version is never loaded: it is asked for, somebody starts an engine that runs it, and that replica
is probed and routed to like any other. What is no longer asked for is stopped (docs/decisions/0006).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from domain.errors import CorruptArtifact, EngineUnavailable, RatchetError
from serving.demands import Demands
from serving.replica import NO_SLOT, SERVED_NAME, Files, KnownReplica, Replica, WantedVersion
from serving.routes import Endpoint, Route, Routes, RouteTable

logger = logging.getLogger(__name__)

Record = Callable[[str, str, str | None, str | None], None]
"""(assistant id, alias, id of the version that answers for it, what keeps the wanted one from an engine)."""
Demand = Callable[[Sequence[str]], Mapping[str, str]]
"""Asks for engines that run these full versions, for at least a minute from now, and takes back what it asked
for besides; returns by id why one does not run."""
ENSURE_SECONDS = 30.0
ASKED_SECONDS = 120.0
"""How long a version that a request named keeps its checkpoint asked for, unless it is brought up before: an
engine's start takes minutes."""
STOP_SECONDS = 5.0
EVALUATION_SLOTS = 2
"""Kept free on every engine: an evaluation loads an adapter at a time, under a name of its own."""


class SwapController:
    """A context manager: its threads run inside the block. Callables may be called from any of them.

    Lock order: a replica's, then _reading or _recording, then _lock, then the route table's.
    """

    def __init__(
        self,
        *,
        wanted: Callable[[], Sequence[WantedVersion]],
        served: Callable[[], Sequence[WantedVersion]],
        replicas: Callable[[], Sequence[KnownReplica]],
        verify: Callable[[str, str], Path],
        base_config: Callable[[str], Mapping[str, Any]],
        record: Record,
        demand: Demand,
        routes: RouteTable,
        max_rank: int | None = None,
        slots: int = 64,
        poll_seconds: float = 1.0,
        idle_seconds: float = 30.0,
    ) -> None:
        self._read_wanted = wanted
        self._read_served: Callable[[], Sequence[WantedVersion]] | None = served
        """What answered for the aliases when the last controller ended; asked once. A wanted version whose
        engine is only starting has this one answer until then."""
        self._read_replicas = replicas
        self._files = Files(verify, base_config, max_rank)
        self._record = record
        self._demands = Demands(demand)
        self._routes = routes
        self._slots = slots
        """Adapters that an engine may hold, those of evaluations included."""
        self._poll_seconds = poll_seconds
        self._idle_seconds = idle_seconds

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wanted: dict[tuple[str, str], WantedVersion] = {}
        """By (assistant id, alias)."""
        self._serving: dict[tuple[str, str], WantedVersion] = {}
        """What answers for an alias now: the wanted version, or the one before it."""
        self._loaded: dict[str, WantedVersion] = {}
        """Every version that some replica acknowledges, by id."""
        self._asked: dict[str, float] = {}
        """Checkpoints that requests for a version by its number need, and until when (time.monotonic)."""
        self._replicas: dict[tuple[str, str], Replica] = {}
        """By (url, base model)."""
        self._busy: set[Replica] = set()
        self._reading = threading.Lock()
        self._recording = threading.Lock()
        self._recorded: dict[tuple[str, str], tuple[str | None, str | None]] = {}

        self._nudged = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swap-controller", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._nudged.set()
        self._thread.join(STOP_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, STOP_SECONDS)
            for replica in self._replicas.values():
                replica.client.close()

    def nudge(self) -> None:
        """Something changed: look now."""
        self._nudged.set()

    def wait_serving(self, assistant_id: str, alias: str, version_id: str, timeout: float) -> bool:
        """Whether the version answers for the alias within `timeout` seconds."""

        def serving() -> bool:
            version = self._serving.get((assistant_id, alias))
            return (
                version is not None and version.version_id == version_id and self._route(version) is not None
            )

        with self._changed:
            return self._changed.wait_for(serving, timeout)

    def ensure_loaded(self, wanted: WantedVersion, timeout: float = ENSURE_SECONDS) -> None:
        """Make the version answer under its number (and its alias, if it is what the alias names now), on
        at least one engine; what the engines really hold is looked up. It stays for `idle_seconds` at least.

        Raises EngineUnavailable, also while the engine of a checkpoint is only starting: that takes longer
        than a request may wait. Raises CorruptArtifact.
        """
        give_up_at = time.monotonic() + timeout
        if wanted.checkpoint_id is not None:
            with self._lock:
                self._asked[wanted.checkpoint_id] = time.monotonic() + ASKED_SECONDS
        self._read()
        with self._lock:
            candidates = self._candidates(wanted)
            problem: RatchetError = self._no_engine(wanted)
        for replica in candidates:
            if not replica.lock.acquire(timeout=max(0.0, give_up_at - time.monotonic())):
                problem = EngineUnavailable(f"The inference engine at {replica.url} is busy loading.")
                continue
            try:
                self._bring_up(replica, wanted, self._present(replica))
                break
            except RatchetError as error:
                problem = error
            finally:
                replica.lock.release()
        else:
            raise problem
        self._flip()
        self.nudge()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._nudged.clear()
            try:
                self._read()
                self._start_work()
                self._flip()
            except Exception:
                # The ledger is away: routes stay as they are, and the next round tries again.
                logger.exception("could not reconcile; still serving as before")
            self._record_changes()
            self._nudged.wait(self._poll_seconds)

    def _read(self) -> None:
        """Take over what the ledger says. One reader at a time, or an older answer could win."""
        with self._reading:
            wanted = self._read_wanted()
            served = self._read_served() if self._read_served is not None else ()
            with self._lock:
                self._read_served = None
                keys = {(version.assistant_id, version.alias) for version in wanted}
                for version in served:
                    if (version.assistant_id, version.alias) in keys:
                        self._serving.setdefault((version.assistant_id, version.alias), version)
                checkpoints = self._checkpoints(wanted)
                running = {replica.base_model for replica in self._replicas.values()}
            # First asked for, then looked for: what is found has not been let go since.
            self._demands.renew(checkpoints, running)
            known = self._read_replicas()
            with self._lock:
                self._wanted = {(version.assistant_id, version.alias): version for version in wanted}
                before, self._replicas = self._replicas, {}
                for one in known:
                    key = (one.url, one.base_model)
                    replica = before.get(key)
                    if replica is None or replica.model_name != one.model_name:
                        replica = Replica(one)
                    self._replicas[key] = replica

    def _start_work(self) -> None:
        with self._lock:
            idle = [replica for replica in self._replicas.values() if replica not in self._busy]
            self._busy.update(idle)
        for replica in idle:
            threading.Thread(
                target=self._work, args=(replica,), name=f"swap-{replica.url}", daemon=True
            ).start()

    def _work(self, replica: Replica) -> None:
        """One round on one replica."""
        try:
            with replica.lock:
                present = self._present(replica)
                self._load_missing(replica, present)
                self._unload_idle(replica, present)
        except EngineUnavailable as error:
            logger.debug("round on %s ended: %s", replica.url, error.message)
        except Exception:
            logger.exception("a round on %s failed; the next one tries again", replica.url)
        finally:
            with self._changed:
                self._busy.discard(replica)
                behind = self._behind(replica)
                self._changed.notify_all()
            self._record_changes()
            if behind:  # a nudge came while this round was on its way
                self.nudge()

    def _load_missing(self, replica: Replica, present: set[str]) -> None:
        """Bring up what is needed and flip after each; what fails is remembered and stops nothing else."""
        with self._lock:
            needed = {replica.engine_model(version): version for version in self._needed(replica)}
        for version in needed.values():
            try:
                self._bring_up(replica, version, present)
            except RatchetError as error:
                logger.debug("%s", error.message)
            self._flip()
            self._record_changes()

    def _present(self, replica: Replica) -> set[str]:
        """The engine's models; what it lost by a restart is no longer acknowledged."""
        try:
            present = replica.client.models()
        except EngineUnavailable as error:
            with self._lock:
                # Its acknowledgements stay: an engine too busy to list its models still answers requests.
                if replica.unreachable is None:
                    logger.warning("%s", error.message)
                replica.unreachable = error
            self._flip()
            raise
        with self._lock:
            replica.unreachable = None
            replica.acknowledged &= present
        self._flip()
        return present

    def _bring_up(self, replica: Replica, wanted: WantedVersion, present: set[str]) -> None:
        """With replica.lock held. Raises the last error while it is too early to try again."""
        name = replica.engine_model(wanted)
        with self._lock:
            waiting = replica.waiting(name)
            acknowledged = name in replica.acknowledged
        if waiting is not None:
            raise waiting
        if not acknowledged:
            try:
                if name not in present:
                    self._make_room(replica, present)
                replica.bring_up(wanted, present, self._files)
            except (RatchetError, OSError) as error:
                problem = error if isinstance(error, RatchetError) else CorruptArtifact(str(error))
                with self._lock:
                    replica.failed(name, problem)
                raise problem from error
        with self._lock:
            replica.acknowledged.add(name)
            replica.failures.pop(name, None)
            self._loaded[wanted.version_id] = wanted
            self._asked.pop(wanted.checkpoint_id or "", None)
            self._routes.touch(replica.endpoint(wanted))

    def _make_room(self, replica: Replica, present: set[str]) -> None:
        """Unload, least recently used first, until one more adapter fits; what was is gone from `present`.

        What aliases name and what is in use stays. Raises EngineUnavailable (`no_slot`) when nothing else
        is left. With replica.lock held.
        """
        others = present - {replica.model_name}
        own = {name for name in others if SERVED_NAME.search(name)}
        room = self._slots - max(EVALUATION_SLOTS, len(others - own))
        for name in sorted(own, key=lambda one: self._routes.last_used(Endpoint(replica.url, one))):
            if len(own) < room:
                return
            if self._retire(replica, name, 0.0):
                own.discard(name)
                present.discard(name)
        if len(own) >= room:
            raise EngineUnavailable(
                f"The inference engine at {replica.url} holds {len(others)} adapters and may hold "
                f"{self._slots} (RATCHET_ENGINE_ADAPTERS, {EVALUATION_SLOTS} of them for evaluations); "
                "none of them can go, since aliases name them or requests use them.",
                code=NO_SLOT,
            )

    def _retire(self, replica: Replica, name: str, idle_seconds: float) -> bool:
        """Whether the adapter was unloaded, because nobody needs it. With replica.lock held."""
        with self._lock:
            # In one step with the flips: a version that an alias takes up again is either still
            # routed, or no longer acknowledged and loaded afresh.
            needed = {replica.engine_model(version) for version in self._needed(replica)}
            if name in needed or not self._routes.retire(Endpoint(replica.url, name), idle_seconds):
                return False
            replica.acknowledged.discard(name)
        replica.client.unload(name)
        logger.info("unloaded %s from %s", name, replica.url)
        return True

    def _unload_idle(self, replica: Replica, present: set[str]) -> None:
        for name in present - {replica.model_name}:
            if SERVED_NAME.search(name) is not None:
                self._retire(replica, name, self._idle_seconds)
        with self._lock:
            if self._runs_idle_checkpoint(replica) and self._routes.retire(
                Endpoint(replica.url, replica.model_name), self._idle_seconds
            ):
                replica.acknowledged.clear()
                logger.info("%s on %s is needed no more", replica.model_name, replica.url)

    def _flip(self) -> None:
        """Route every alias to its wanted version where a replica acknowledges that, else leave it."""
        with self._changed:
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
            self._routes.replace(Routes(aliases, versions))
            self._changed.notify_all()

    def _record_changes(self) -> None:
        """Tell the ledger what changed. One teller at a time, or an older state could be told last."""
        with self._recording:
            with self._lock:
                states = {key: self._state(key, wanted) for key, wanted in self._wanted.items()}
            for key, state in states.items():
                if self._recorded.get(key, (None, None)) == state:
                    continue
                try:
                    self._record(*key, *state)
                except Exception:
                    # The ledger is away: serving goes on, and the next round tells it.
                    logger.exception("could not record what serves")
                    return
                self._recorded[key] = state

    def _state(self, key: tuple[str, str], wanted: WantedVersion) -> tuple[str | None, str | None]:
        """(id of the version that answers, what keeps the wanted one from an engine). With _lock held."""
        serving = self._serving.get(key)
        if serving is not None and self._route(serving) is None:
            serving = None
        answers = serving is not None and serving.version_id == wanted.version_id
        errors = []
        for replica in self._candidates(wanted):
            failure = replica.failures.get(replica.engine_model(wanted))
            if failure is not None:
                errors.append(failure.error.message)
            elif replica.unreachable is not None and not answers:
                errors.append(replica.unreachable.message)
        if not self._candidates(wanted):
            errors.append(self._no_engine(wanted).message)
        return serving.version_id if serving is not None else None, "; ".join(errors) or None

    def _route(self, version: WantedVersion) -> Route | None:
        """The replicas that acknowledge the version; those that don't answer only if no other does. With
        _lock held."""
        able = [
            replica
            for replica in self._candidates(version)
            if replica.engine_model(version) in replica.acknowledged
        ]
        chosen = [replica for replica in able if replica.unreachable is None] or able
        endpoints = tuple(replica.endpoint(version) for replica in chosen)
        return Route(version.version_id, version.number, endpoints) if endpoints else None

    def _needed(self, replica: Replica) -> list[WantedVersion]:
        """What the replica must hold: the wanted versions, and those that still answer in their stead.
        With _lock held."""
        versions = [*self._wanted.values(), *self._serving.values()]
        return [version for version in versions if version.engine_base == replica.base_model]

    def _checkpoints(self, wanted: Sequence[WantedVersion]) -> set[str]:
        """The full versions whose engines must run. With _lock held."""
        now = time.monotonic()
        self._asked = {id: until for id, until in self._asked.items() if until > now}
        used = [*wanted, *self._serving.values(), *self._loaded.values()]
        return {version.checkpoint_id for version in used if version.checkpoint_id} | self._asked.keys()

    def _runs_idle_checkpoint(self, replica: Replica) -> bool:
        """Whether it answers for a full version alone, which nothing wants. With _lock held."""
        runs_checkpoint = any(v.checkpoint_id == replica.base_model for v in self._loaded.values())
        answers_for_it_alone = replica.acknowledged == {replica.model_name}
        return runs_checkpoint and answers_for_it_alone and not self._needed(replica)

    def _behind(self, replica: Replica) -> bool:
        """Whether there is something to load right now. With _lock held."""
        return replica.unreachable is None and any(
            name not in replica.acknowledged and replica.waiting(name) is None
            for name in map(replica.engine_model, self._needed(replica))
        )

    def _candidates(self, version: WantedVersion) -> list[Replica]:
        return [one for one in self._replicas.values() if one.base_model == version.engine_base]

    def _no_engine(self, wanted: WantedVersion) -> EngineUnavailable:
        name = f"{wanted.assistant_name}@v{wanted.number}"
        if wanted.checkpoint_id is None:
            told = f"No inference engine is registered for the base model '{wanted.base_model}'."
        elif problem := self._demands.problems.get(wanted.checkpoint_id):
            told = f"No inference engine runs the checkpoint of '{name}': {problem}"
        else:
            told = f"An inference engine for the checkpoint of '{name}' is starting; try again shortly."
        return EngineUnavailable(told)
