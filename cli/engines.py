"""The inference engines of `ratchet up`: one for each base model in use, and one for each full version, or
candidate for one, that somebody needs (registry/engines.py)."""

import time
from dataclasses import dataclass

from artifacts.base_models import BUILT_IN
from cli.components import Engine
from cli.supervisor import Child, Supervisor, say
from domain.settings import Settings
from domain.version import WholeModel
from registry import engines, serving
from registry.session import LedgerError, make_engine, make_reading_sessions, make_sessions

BUILT_IN_MODEL = next(iter(BUILT_IN))
START_CRASHES = 4
"""A component that ends this often in a row before the stack is ready is reported, not retried."""
WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class _End:
    """Of an engine's process; its next one has another url."""

    whole_id: str | None
    url: str
    words: str


class Engines:
    """Keeps the running engines and the registered replicas equal to what is needed. Main thread only."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        database = make_engine(settings.resolved_database_url)
        self._sessions = make_sessions(database)
        self._reads = make_reading_sessions(database)
        self._running: dict[str, tuple[Engine, Child]] = {}
        """By what they run: a base model's name or a whole model's id."""
        self._watched_at = 0.0
        self._ends: list[_End] = []
        """Not yet in the ledger."""
        self._away = False
        """Whether the ledger did not answer when it was last asked."""

    def start_base(self, base_model: str) -> None:
        name = "engine" if not self._running else f"engine-{len(self._running) + 1}"
        self._add(Engine(self._settings, base_model, name))

    def watch(self, ended: list[Child]) -> None:
        """Note which engines `ended` or answer now; start what is needed, stop what is not.

        While the ledger is away all stays as it is, and what could not be noted is noted later.
        """
        for engine, child in self._running.values():
            if child in ended:
                self._ends.append(_end(engine, child))
                engine.registered = False
        due = time.monotonic() - self._watched_at >= WATCH_SECONDS
        if not due and (self._away or not self._ends):
            return
        try:
            self._tell_ends()
            if due and self._running:
                self._follow_ledger()
        except LedgerError as error:
            # A database that restarts, a full disk, a lock held for too long: asking again loses nothing.
            if not self._away:
                say("supervisor", f"the ledger is away, engines stay as they are: {_first_line(error)}")
            self._away = True
        else:
            if self._away:
                say("supervisor", "the ledger answers again")
            self._away = False
        if due:
            self._watched_at = time.monotonic()

    def _follow_ledger(self) -> None:
        """Raises LedgerError."""
        for engine, child in self._running.values():
            if not engine.registered and child.alive and engine.ready():
                self._note_ready(engine)
        with self._reads() as session:
            base_models = serving.base_models_in_use(session)
            wanted = engines.wanted_models(session)
        for base_model in base_models:
            if base_model not in self._running:
                self.start_base(base_model)
        for model in wanted:
            if model.id not in self._running:
                self._start_whole(model)
        for engine, child in list(self._running.values()):
            if engine.whole is not None and engine.whole not in wanted:
                self._let_go(engine, child)

    def settled(self) -> bool:
        """Each serves, or is one that the stack can do without and that does not start."""
        return all(
            engine.registered or (child.crashes >= START_CRASHES and self.may_miss(child))
            for engine, child in self._running.values()
        )

    def may_miss(self, child: Child) -> bool:
        """An engine of some assistants' own base model, whose folder may be gone: others still serve."""
        return any(child is one for runs, (_, one) in self._running.items() if runs != BUILT_IN_MODEL)

    def lost(self) -> list[str]:
        """What has no engine, each with its verb."""
        return [
            f"assistants on the base model {engine.runs} are"
            if engine.whole is None
            else f"{engine.served_name} is"
            for engine, _ in self._running.values()
            if not engine.registered
        ]

    def forget_replicas(self) -> None:
        """The home is ours alone: whatever is registered belongs to processes that are gone. Raises
        LedgerError."""
        with self._sessions.begin() as session:
            for replica in serving.replicas(session):
                serving.remove_replica(session, url=replica.url)

    def _start_whole(self, model: WholeModel) -> None:
        limit = self._settings.max_engines
        if len(self._running) < limit:
            self._add(Engine(self._settings, model.base_model, f"engine-{model.served_name}", model))
            return
        with self._sessions.begin() as session:
            reason = f"RATCHET_MAX_ENGINES allows {limit} engines, and as many run."
            engines.report(session, model.id, reason)

    def _let_go(self, engine: Engine, child: Child) -> None:
        with self._sessions.begin() as session:
            if not engines.let_go(session, engine.runs, engine.url):
                return
        del self._running[engine.runs]
        self._supervisor.retire(child)

    def _add(self, engine: Engine) -> None:
        self._running[engine.runs] = engine, self._supervisor.add(engine.component)

    def _tell_ends(self) -> None:
        if not self._ends:
            return
        with self._sessions.begin() as session:
            for end in self._ends:
                serving.remove_replica(session, url=end.url)
                if end.whole_id is not None:
                    engines.report(session, end.whole_id, f"its engine ended: {end.words}")
        self._ends.clear()

    def _note_ready(self, engine: Engine) -> None:
        with self._sessions.begin() as session:
            serving.register_replica(
                session, url=engine.url, base_model=engine.runs, model_name=engine.served_name
            )
            if engine.whole is not None:
                engines.report(session, engine.runs, None)
        engine.registered = True
        if engine.whole is not None:
            say("supervisor", f"{engine.served_name} answers at {engine.url}")


def _end(engine: Engine, child: Child) -> _End:
    words = child.tail[-1] if child.tail else "no output"
    return _End(None if engine.whole is None else engine.whole.id, engine.url, words)


def _first_line(error: LedgerError) -> str:
    return str(error).partition("\n")[0]
