"""The swap controller: makes the engines serve what the aliases say.

Every `poll_seconds`, or when nudged, it reads what is wanted and which engines there are, and works each
engine in a thread of its own, so that a slow one holds up nobody: load what is missing (verified files,
unique name), probe it, flip the route (`fleet.py`), and later unload what no alias names, nobody holds and
nobody used for `idle_seconds` (`slots.py`). A version that can't be loaded leaves the old route as it is.

A full version is never loaded: it is asked for, somebody starts an engine that runs it, and that replica
is probed and routed to like any other. What is no longer asked for is stopped (docs/decisions/0006).
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from domain.errors import EngineUnavailable, RatchetError
from serving.demands import Demands
from serving.fleet import Fleet
from serving.recorder import Record, Recorder
from serving.replica import OTHER_MODEL, Files, KnownReplica, Replica, WantedVersion
from serving.routes import RouteTable
from serving.slots import Slots

logger = logging.getLogger(__name__)

Demand = Callable[[Sequence[str]], Mapping[str, str]]
"""Asks for engines that run these full versions, for at least a minute from now, and takes back what it asked
for besides; returns by id why one does not run."""
ENSURE_SECONDS = 30.0
STOP_SECONDS = 5.0


class SwapController:
    """A context manager: its threads run inside the block. Callables may be called from any of them.

    Lock order: a replica's, then _reading or the recorder's, then the fleet's, then the route table's.
    """

    def __init__(
        self,
        *,
        wanted: Callable[[], Sequence[WantedVersion]],
        served: Callable[[], Sequence[WantedVersion]],
        replicas: Callable[[Collection[str]], Sequence[KnownReplica]],
        verify: Callable[[str, str], Path],
        held: Callable[[str], AbstractContextManager[None]],
        base_config: Callable[[str], Mapping[str, Any]],
        record: Record,
        demand: Demand,
        routes: RouteTable,
        max_rank: int | None = None,
        slots: int = 64,
        priorities: bool = False,
        poll_seconds: float = 1.0,
        idle_seconds: float = 30.0,
    ) -> None:
        self._read_wanted = wanted
        self._read_served: Callable[[], Sequence[WantedVersion]] | None = served
        """What answered for the aliases when the last controller ended; asked once. A wanted version whose
        engine is only starting has this one answer until then."""
        self._read_replicas = replicas
        """Told the urls of those that run something else than they are known for."""
        self._files = Files(verify, held, base_config, max_rank)
        self._demands = Demands(demand)
        self._fleet = Fleet(routes, self._demands, priorities)
        self._slots = Slots(self._fleet, slots)
        self._recorder = Recorder(self._fleet, record)
        self._poll_seconds = poll_seconds
        self._idle_seconds = idle_seconds

        self._busy: set[Replica] = set()
        """Those with a round on its way. Guarded by the fleet's lock."""
        self._reading = threading.Lock()
        self._informed = True
        """Whether the ledger could be read when the last round looked."""

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
        with self._fleet.changed:
            self._fleet.changed.wait_for(lambda: not self._busy, STOP_SECONDS)
            for replica in self._fleet.replicas.values():
                replica.forget()
                replica.client.close()

    def nudge(self) -> None:
        """Something changed: look now."""
        self._nudged.set()

    def wait_serving(self, assistant_id: str, alias: str, version_id: str, timeout: float) -> bool:
        """Whether the version answers for the alias within `timeout` seconds."""
        return self._fleet.wait_serving(assistant_id, alias, version_id, timeout)

    def ensure_loaded(self, wanted: WantedVersion, timeout: float = ENSURE_SECONDS) -> None:
        """Make the version answer under its number (and its alias, if it is what the alias names now), on
        at least one engine; what the engines really hold is looked up. It stays for `idle_seconds` at least.

        Raises EngineUnavailable, also while the engine of a checkpoint is only starting: that takes longer
        than a request may wait. Raises CorruptArtifact.
        """
        give_up_at = time.monotonic() + timeout
        if wanted.checkpoint_id is not None:
            self._fleet.ask_for(wanted.checkpoint_id)
        self._read()
        with self._fleet.lock:
            candidates = self._fleet.candidates(wanted)
        problem: RatchetError = self._fleet.no_engine(wanted)
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
        self.nudge()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._nudged.clear()
            self._try_to_read()
            try:
                # With the ledger away too: an engine that loses its adapters then must lose its requests.
                self._start_work()
                self._fleet.flip()
            except Exception:
                # No thread to be had: routes stay as they are, and the next round tries again.
                logger.exception("could not reconcile; still serving as before")
            self._recorder.tell_changes()
            self._nudged.wait(self._poll_seconds)

    def _try_to_read(self) -> None:
        try:
            self._read()
        except Exception:
            # The ledger is away: what it said last holds, and the next round asks again.
            if self._informed:
                logger.exception("could not read the ledger; going on with what it said last")
            self._informed = False
        else:
            self._informed = True

    def _read(self) -> None:
        """Take over what the ledger says. One reader at a time, or an older answer could win."""
        with self._reading:
            wanted = self._read_wanted()
            if self._read_served is not None:
                self._fleet.resume(self._read_served(), wanted)
                self._read_served = None
            with self._fleet.lock:
                running = {replica.base_model for replica in self._fleet.replicas.values()}
            # First asked for, then looked for: what is found has not been let go since.
            self._demands.renew(self._fleet.checkpoints(wanted), running)
            self._fleet.want(wanted, self._read_replicas(self._fleet.mistaken()))

    def _start_work(self) -> None:
        with self._fleet.lock:
            idle = [replica for replica in self._fleet.replicas.values() if replica not in self._busy]
        for replica in idle:
            with self._fleet.lock:
                self._busy.add(replica)
            try:
                threading.Thread(
                    target=self._work, args=(replica,), name=f"swap-{replica.url}", daemon=True
                ).start()
            except RuntimeError:
                with self._fleet.lock:
                    self._busy.discard(replica)
                raise

    def _work(self, replica: Replica) -> None:
        """One round on one replica."""
        broke = False
        try:
            with replica.lock:
                present = self._present(replica)
                self._load_missing(replica, present)
                if self._informed:  # else an alias may have moved to what seems idle
                    self._slots.unload_idle(replica, present, self._idle_seconds)
                    self._fleet.release_idle_checkpoint(replica, self._idle_seconds)
        except EngineUnavailable as error:
            logger.debug("round on %s ended: %s", replica.url, error.message)
        except Exception:
            # A defect of ours, or an engine that answers nonsense: the next round, in its time, tries again.
            broke = True
            logger.exception("a round on %s failed; the next one tries again", replica.url)
        finally:
            with self._fleet.changed:
                self._busy.discard(replica)
                behind = not broke and self._fleet.behind(replica)
                self._fleet.changed.notify_all()
            self._recorder.tell_changes()
            if behind:  # a nudge came while this round was on its way
                self.nudge()

    def _load_missing(self, replica: Replica, present: set[str]) -> None:
        """Bring up what is needed, one by one; what fails is remembered and stops nothing else."""
        with self._fleet.lock:
            needed = {replica.engine_model(version): version for version in self._fleet.needed(replica)}
        for version in needed.values():
            try:
                self._bring_up(replica, version, present)
            except RatchetError as error:
                logger.debug("%s", error.message)
            self._recorder.tell_changes()

    def _present(self, replica: Replica) -> set[str]:
        """The engine's models; what it lost by a restart is no longer acknowledged."""
        try:
            present = replica.models()
        except EngineUnavailable as error:
            with self._fleet.lock:
                # Its acknowledgements stay: an engine too busy to list its models still answers requests.
                # But not what another model acknowledged.
                if error.code == OTHER_MODEL:
                    replica.acknowledged.clear()
                if replica.unreachable is None:
                    logger.warning("%s", error.message)
                replica.unreachable = error
            self._fleet.flip()
            raise
        with self._fleet.lock:
            replica.unreachable = None
            replica.acknowledged &= present
        self._fleet.flip()
        return present

    def _bring_up(self, replica: Replica, wanted: WantedVersion, present: set[str]) -> None:
        """With replica.lock held. Raises the last error while it is too early to try again."""
        name = replica.engine_model(wanted)
        with self._fleet.lock:
            waiting = replica.waiting(name)
            acknowledged = name in replica.acknowledged
        if waiting is not None:
            raise waiting
        if not acknowledged:
            try:
                if name not in present:
                    self._slots.make_room(replica, present)
                replica.bring_up(wanted, present, self._files)
            except Exception as error:
                # Whatever it is (the ledger away, a reply or a file of a kind never seen), it is a setback of
                # this version on this engine, and waits like any other; those after it have their turn.
                with self._fleet.lock:
                    problem = replica.failed(name, error)
                raise problem from error
        self._fleet.acknowledge(replica, wanted)
