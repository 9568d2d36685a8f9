"""`ratchet up` for real: starts, answers, refuses a second one, restarts, stops, leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from artifacts import base_models
from cli.supervisor import spawn
from domain.settings import Settings

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
STOP_SECONDS = 120
ANSWER_SECONDS = 60
"""Of a process that is busy restarting or starved."""

pytestmark = pytest.mark.slow


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def processes_of(home: Path) -> dict[int, str]:
    """Pid -> command of every living process whose environment names this home."""
    found = {}
    mark = f"RATCHET_HOME={home}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            belongs = mark in (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended meanwhile, or not ours
        if belongs and command:  # a zombie has no command line
            found[int(entry.name)] = command
    return found


class Up:
    """One `ratchet up`; its home lies in a short path because of the Unix socket."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        command = [sys.executable, "-m", "cli", "up", "--home", str(home), "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RATCHET_HOME": "/nonexistent", **settings}
        self.log = home / "up.log"
        with self.log.open("ab") as log:
            self.process = spawn(  # should the tests be killed, it stops too
                command,
                death_signal=signal.SIGTERM,
                environment=environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("ready http://127.0.0.1:"), self.log.read_text()[-3000:]
        return line.removeprefix("ready ").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ratchet-up-") as folder:
        yield Path(folder)
        left = processes_of(Path(folder))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "the test left processes"


def find(home: Path, text: str) -> list[int]:
    return [pid for pid, command in processes_of(home).items() if text in command]


def test_start_restart_refuse_a_second_and_stop(home: Path) -> None:
    up = Up(home)
    try:
        url = up.ready()
        assert httpx.get(f"{url}/readyz", timeout=ANSWER_SECONDS).status_code == 200
        assert httpx.get(f"{url}/v1/assistants", timeout=ANSWER_SECONDS).json()["data"] == []
        for part in ("valkey-server", "-m engine", "celery", "worker.dispatcher", "api.app:create_app"):
            assert find(home, part), part
        for name in ("valkey", "engine", "api", "worker", "dispatcher"):
            assert (home / "logs" / f"{name}.log").is_file(), name
        assert (home / "valkey.sock").is_socket()
        until(lambda: "api        | " in up.log.read_text(), START_SECONDS, "the API's log is not shown")

        second = subprocess.run(
            [sys.executable, "-m", "cli", "up", "--home", str(home), "--port", "0"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert second.returncode == 1
        assert second.stdout == ""
        assert f"the home {home} is in use by `ratchet up` at {url}" in second.stderr

        [api] = find(home, "api.app:create_app")
        os.kill(api, signal.SIGKILL)
        until(lambda: bool(find(home, "api.app:create_app")), START_SECONDS, "the API did not start again")
        # The supervisor holds the socket: a request during the restart waits and is answered.
        assert httpx.get(f"{url}/healthz", timeout=ANSWER_SECONDS).status_code == 200

        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(STOP_SECONDS) == 0
        assert up.process.stdout is not None
        assert up.process.stdout.read() == b"", "more than the ready line on standard output"
        assert processes_of(home) == {}
        stops = [
            line for line in up.log.read_text().splitlines() if line.startswith("supervisor | stopping ")
        ]
        assert [line.split()[-1] for line in stops] == ["dispatcher", "worker", "api", "engine", "valkey"]
    finally:
        up.kill()


def test_an_assistant_with_another_base_model_gets_its_own_engine(home: Path) -> None:
    cached = base_models.resolve("smollm2-135m-instruct", Settings().cache_dir).path
    other = home / "other-model"  # the same weights under another name
    other.symlink_to(cached)
    up = Up(home)
    try:
        with httpx.Client(base_url=up.ready(), timeout=ANSWER_SECONDS) as client:
            assert len(find(home, "-m engine")) == 1
            made = client.post("/v1/assistants", json={"name": "second", "base_model": str(other)})
            assert made.status_code == 201, made.text

            def answers() -> bool:
                body = {"model": "second", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
                return client.post("/v1/chat/completions", json=body).status_code == 200

            until(answers, START_SECONDS, "no engine for the second base model")
            [engine] = find(home, f"-m engine --model {other}")
            assert len(find(home, "-m engine")) == 2
            os.kill(engine, signal.SIGKILL)
            until(
                lambda: not answers() or find(home, f"-m engine --model {other}") != [engine],
                START_SECONDS,
                "killed",
            )
            until(answers, START_SECONDS, "the engine did not come back")
            assert client.get("/readyz").status_code == 200
    finally:
        up.process.terminate()
        up.process.wait(STOP_SECONDS)
        up.kill()


def test_kill_9_of_the_supervisor_leaves_no_orphan_and_the_home_usable(home: Path) -> None:
    base = home / "base-model"
    base.symlink_to(base_models.resolve("smollm2-135m-instruct", Settings().cache_dir).path)
    up = Up(home)
    try:
        url = up.ready()
        body = {"name": "a", "base_model": str(base)}
        made = httpx.post(f"{url}/v1/assistants", json=body, timeout=ANSWER_SECONDS)
        assert made.status_code == 201, made.text
        assert len(processes_of(home)) >= 6  # five components, and the worker's pool
        up.kill()
        until(lambda: processes_of(home) == {}, ANSWER_SECONDS, "orphans")
    finally:
        up.kill()
    base.unlink()  # one assistant's base model is lost: the stack must come up for the others
    again = Up(home)
    try:
        url = again.ready()
        listed = httpx.get(f"{url}/v1/assistants", timeout=ANSWER_SECONDS).json()["data"]
        assert [a["name"] for a in listed] == ["a"]
        assert f"assistants on the base model {base} are not served" in again.log.read_text()
        assert f"there is no folder {base}" in (home / "logs" / "engine-2.log").read_text()
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(STOP_SECONDS) == 0
    finally:
        again.kill()


def test_sigterm_before_the_stack_is_ready_stops_it(home: Path) -> None:
    up = Up(home)
    try:
        until(lambda: bool(find(home, "valkey-server")), START_SECONDS, "Valkey did not start")
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(STOP_SECONDS) == 0
        assert up.process.stdout is not None
        assert up.process.stdout.read() == b""
        assert processes_of(home) == {}
    finally:
        up.kill()
