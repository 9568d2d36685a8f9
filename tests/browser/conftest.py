"""A real Chromium before a real stack: engine, API under uvicorn, SQLite, version files."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from sqlalchemy.orm import Session, sessionmaker

from registry.serving import register_replica
from registry.session import make_engine, make_sessions, upgrade
from tests.browser.tiny_model import write_adapter, write_base
from tests.engine_log import port_in
from tests.seeded_story import Files, Story, tell

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1400",
)


@dataclass(frozen=True)
class Stack:
    url: str
    sessions: sessionmaker[Session]
    files: Files
    base_model: str

    def tell(self, name: str) -> Story:
        """The story once more, about an assistant of this name."""
        return tell(self.sessions, self.files, base_model=self.base_model, name=name)


@pytest.fixture(scope="module")
def chromium() -> tuple[str, str]:
    """Paths of the browser and of its driver."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return browser, driver


@pytest.fixture(scope="module")
def browser(
    chromium: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromium[1]))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def stack(chromium: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("stack")
    base, home = root / "tiny-base", root / "home"
    write_base(base)
    home.mkdir()
    database = f"sqlite:///{home / 'ratchet.db'}"
    upgrade(database)
    ledger = make_engine(database)
    sessions = make_sessions(ledger)
    engine = ["engine", "--model", str(base), "--served-model-name", "tiny", "--port", "0"]
    api = ["uvicorn", "api.app:create_app", "--factory", "--log-level", "warning"]
    api += ["--timeout-graceful-shutdown", "1"]  # a page that is still open hears events without end
    with ExitStack() as processes:
        processes.callback(ledger.dispose)
        listener = processes.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        url, engine_log = f"http://127.0.0.1:{listener.getsockname()[1]}", root / "engine.log"
        processes.enter_context(_running(engine_log, home, *engine))
        api += ["--fd", str(listener.fileno())]
        processes.enter_context(_running(root / "api.log", home, *api, pass_fds=(listener.fileno(),)))
        _await(lambda: port_in(engine_log) is not None, "the engine", root)
        with sessions.begin() as session:
            register_replica(session, f"http://127.0.0.1:{port_in(engine_log)}", str(base), "tiny")
        _await(lambda: _answers(f"{url}/healthz"), "the API", root)
        yield Stack(url, sessions, Files(home / "artifacts", home / "staging", write_adapter), str(base))


@contextmanager
def _running(log: Path, home: Path, *module: str, pass_fds: tuple[int, ...] = ()) -> Iterator[None]:
    environment = {
        **os.environ,
        "RATCHET_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            env=environment,
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(condition: Callable[[], bool], what: str, logs: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            told = "\n".join(file.read_text()[-2000:] for file in logs.glob("*.log"))
            pytest.fail(f"{what} did not answer within {START_SECONDS:.0f} s:\n{told}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
