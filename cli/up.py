"""`ratchet up`: the embedded stack under one supervisor.

Start order: home and lock, migrations, Valkey, engine, API, worker, dispatcher. Stop order: reverse.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path

from cli import components
from cli.engines import BUILT_IN_MODEL, START_CRASHES, Engines
from cli.errors import CliError
from cli.home import HomeLock, socket_path
from cli.supervisor import Child, StopRequest, Supervisor, say
from domain.settings import Settings
from registry.session import LedgerError, is_away, upgrade

START_SECONDS = 1800.0
"""Upper bound of a first start, which may download and convert a base model."""
POLL_SECONDS = 0.2


class StoppedEarly(Exception):
    """Asked to stop while still starting."""


class Stack:
    """Everything that `ratchet up` starts. Main thread only (see `supervisor`)."""

    def __init__(self, settings: Settings, listener: socket.socket, stopping: StopRequest) -> None:
        self._settings = settings
        self._listener = listener
        self._stopping = stopping
        self._supervisor = Supervisor(settings.home / "logs")
        self._engines = Engines(settings, self._supervisor)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Start all and wait until all answer. Raises CliError naming what did not come up."""
        self._engines.forget_replicas()
        if self._settings.broker_url is None:
            path = socket_path(self._settings.home)
            self._supervisor.add(components.valkey(self._settings, path))
            self._await("valkey", lambda: components.valkey_answers(path))
        self._settings.work_dir.mkdir(exist_ok=True)
        if not self._settings.engine_urls:
            self._engines.start_base(BUILT_IN_MODEL)
        self._supervisor.add(components.api(self._settings, self._listener))
        worker = self._supervisor.add(components.worker(self._settings))
        self._supervisor.add(components.dispatcher(self._settings))
        self._await("engine", self._engines.settled)
        self._await("worker", lambda: worker.marked)
        lost = self._engines.lost()
        for served in lost:
            say("supervisor", f"{served} not served until its engine starts")
        self._await("api", lambda: components.answers(f"{self.url}/{'healthz' if lost else 'readyz'}"))

    def run(self) -> None:
        """Restart what crashes and start engines that assistants need, until asked to stop."""
        while not self._stopping:
            self._tick()
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        self._supervisor.stop(lambda: self._stopping.hurry)
        try:
            self._engines.forget_replicas()
        except LedgerError as error:
            # The next start forgets them before anything else.
            say("supervisor", f"the ledger is away, the engines stay registered: {error.__class__.__name__}")

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._stopping:
                raise StoppedEarly
            for child in self._tick():
                if child.crashes >= START_CRASHES and not self._engines.may_miss(child):
                    told = "\n  ".join(child.tail) or "(no output)"
                    raise CliError(
                        f"{child.component.name} ended {child.crashes} times while starting:\n  {told}\n"
                        f"`ratchet doctor` may say why; the whole log is {child.log_file}"
                    )
            if time.monotonic() > deadline:
                raise CliError(f"{name} did not answer within {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _tick(self) -> list[Child]:
        ended = self._supervisor.poll()
        self._engines.watch(ended)
        return ended


def bind(port: int) -> socket.socket:
    """A bound loopback socket; 0 picks a free port. Raises CliError when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. uvicorn takes an inherited socket for a Unix one and leaves it out, and then
    # every first token waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise CliError(f"port {port} on 127.0.0.1 cannot be used: {error.strerror}; try --port 0") from error
    return listener


def migrate(settings: Settings) -> None:
    """Raises CliError when the database does not answer."""
    try:
        upgrade(settings.resolved_database_url)
    except LedgerError as error:
        if not is_away(error):
            raise
        told = str(error).partition("\n")[0]
        raise CliError(f"the database (RATCHET_DATABASE_URL) does not answer: {told}") from error


def up(home: Path, port: int, announce: Callable[[str], None]) -> None:
    """Run the stack until SIGINT, SIGTERM or SIGHUP; `announce` gets the one ready line.

    Raises CliError when the home is taken, a precondition is missing, the database does not answer or a
    component does not start.
    """
    settings = Settings(home=home.expanduser().resolve())
    if settings.broker_url is None:
        socket_path(settings.home)
    if settings.engine == "vllm" and not settings.engine_urls:
        components.require_vllm(settings)
    with HomeLock(settings.home) as lock, bind(port) as listener:
        stopping = StopRequest().install()
        say("supervisor", f"home {settings.home}")
        migrate(settings)
        stack = Stack(settings, listener, stopping)
        lock.describe(f"`ratchet up` at {stack.url}")
        try:
            stack.start()
            announce(f"ready {stack.url}")
            stack.run()
        except StoppedEarly:
            say("supervisor", "asked to stop before the stack was ready")
        finally:
            stack.stop()
        say("supervisor", "stopped")
