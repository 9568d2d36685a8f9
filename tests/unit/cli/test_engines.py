"""The supervisor's engines, with a process of a few lines in place of each."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from cli import components
from cli.components import Engine
from cli.engines import Engines
from cli.supervisor import StopRequest, Supervisor
from cli.up import Stack, bind
from domain.settings import Settings
from domain.version import WholeModel
from registry import aliases, engines, serving
from registry.session import upgrade
from registry.tables import Assistant, Version
from tests.browser.tiny_model import write_base
from tests.conftest_databases import NewDatabase
from tests.unit.registry.steps import Ledger, lines

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_POST = do_GET
    def log_message(self, *_):
        pass
print("serving", sys.argv[2:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class World:
    def __init__(self, home: Path, max_engines: int = 4, url: str | None = None) -> None:
        self.home = home
        if url is None:
            url = f"sqlite:///{home / 'ratchet.db'}"
            upgrade(url)
        self.ledger = Ledger(url)
        self.supervisor = Supervisor(home / "logs")
        self.settings = Settings(home=home, max_engines=max_engines, database_url=url)
        self.engines = Engines(self.settings, self.supervisor)

    def full_version(self) -> tuple[Assistant, Version]:
        """v1 of a new assistant on the base model `tiny`; it is champion."""
        assistant = self.ledger.assistant()
        skill = self.ledger.skill(assistant)
        return assistant, self.ledger.learn(assistant, skill, lines(0, 2), kind="full")

    def point(self, assistant: Assistant, number: int) -> None:
        version = self.ledger.version(assistant, number)
        with self.ledger.begin() as session:
            aliases.move_alias(
                session,
                assistant,
                "champion",
                version,
                kind="promote",
                reason="",
                actor="u",
                expected_revision=None,
            )

    def replicas(self) -> dict[str, str]:
        """What runs -> where."""
        with self.ledger.begin() as session:
            return {replica.base_model: replica.url for replica in serving.replicas(session)}

    def urls(self) -> list[str]:
        with self.ledger.begin() as session:
            return [replica.url for replica in serving.replicas(session)]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it never came to this"
            self.engines.watch(self.supervisor.poll())
            time.sleep(0.05)

    def process(self, runs: str) -> subprocess.Popen[bytes]:
        _, child = self.engines._running[runs]
        assert child.process is not None
        return child.process


@pytest.fixture
def small_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()

    def command(engine: Engine) -> list[str]:
        while (port := components.free_port()) in used:  # the system may give one out again
            continue
        used.add(port)
        engine.url = f"http://127.0.0.1:{port}"
        return [sys.executable, "-c", SERVER, str(port), engine.runs]

    monkeypatch.setattr(Engine, "_command", command)
    monkeypatch.setattr("cli.engines.WATCH_SECONDS", 0.05)


@pytest.fixture
def world(tmp_path: Path, small_engines: None, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(tmp_path, getattr(request, "param", 4))
    yield made
    made.supervisor.stop(lambda: True)
    made.ledger.engine.dispose()


class Outage:
    """PostgreSQL takes no connection to this database and has ended those that there were."""

    def __init__(self, server_url: str, url: str) -> None:
        self._server_url = server_url.replace("+psycopg", "")
        self._name = make_url(url).database

    def _allow(self, allowed: bool) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS {allowed}")
            if not allowed:
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s",
                    [self._name],
                )

    def __enter__(self) -> None:
        self._allow(False)

    def __exit__(self, *_: object) -> None:
        self._allow(True)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_a_full_version_gets_an_engine_of_its_own_for_as_long_as_it_is_needed(world: World) -> None:
    assistant, full = world.full_version()
    world.engines.start_base("tiny")
    world.until(lambda: set(world.replicas()) == {"tiny", full.id})
    with world.ledger.begin() as session:
        [own] = [one for one in serving.replicas(session) if one.base_model == full.id]
    assert own.model_name == full.served_name
    assert answers(own.url)
    world.point(assistant, 0)
    world.until(lambda: set(world.replicas()) == {"tiny"} and not answers(own.url))
    assert answers(world.replicas()["tiny"])


def test_one_that_is_killed_is_no_replica_until_it_answers_again(world: World) -> None:
    _, full = world.full_version()
    world.engines.start_base("tiny")
    world.until(lambda: full.id in world.replicas())
    first = world.replicas()[full.id]
    with world.ledger.begin() as session:
        engines.demand_serving(session, "gw_1", [full.id], 600)
    [(_, child)] = [pair for runs, pair in world.engines._running.items() if runs == full.id]
    assert child.process is not None
    child.process.kill()
    world.until(lambda: full.id not in world.replicas())
    with world.ledger.begin() as session:
        problem = engines.problem(session, full.id)
    assert problem == f"its engine ended: serving ['{full.id}']"
    world.until(lambda: full.id in world.replicas())
    assert world.replicas()[full.id] != first
    with world.ledger.begin() as session:
        assert engines.problem(session, full.id) is None


def test_an_outage_of_the_ledger_ends_nothing_and_what_ended_meanwhile_is_noted(
    tmp_path: Path,
    small_engines: None,
    postgres_url: str,
    new_postgresql: NewDatabase,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = new_postgresql(True)
    world = World(tmp_path, url=url)
    try:
        _, full = world.full_version()
        world.engines.start_base("tiny")
        world.until(lambda: set(world.replicas()) == {"tiny", full.id})
        before = world.replicas()
        base = world.process("tiny")
        with Outage(postgres_url, url):
            world.process(full.id).kill()
            # Through several looks at the ledger, and until the engine runs again elsewhere.
            world.until(lambda: world.process(full.id).poll() is not None)
            world.until(lambda: world.process(full.id).poll() is None)
            world.until(lambda: answers(world.engines._running[full.id][0].url))
        world.until(lambda: world.replicas().get(full.id) not in (None, before[full.id]))
        assert world.replicas()["tiny"] == before["tiny"]
        assert len(world.urls()) == 2
        assert base.poll() is None
        told = capfd.readouterr().err
        assert told.count("the ledger is away") == told.count("the ledger answers again") == 1
    finally:
        world.supervisor.stop(lambda: True)
        world.ledger.engine.dispose()


def test_a_stack_stops_to_its_end_while_the_ledger_is_away(
    tmp_path: Path, small_engines: None, postgres_url: str, new_postgresql: NewDatabase
) -> None:
    url = new_postgresql(True)
    settings = Settings(home=tmp_path, database_url=url)
    with bind(0) as listener:
        stack = Stack(settings, listener, StopRequest())
        stack._engines.start_base("tiny")
        _, child = stack._engines._running["tiny"]
        assert child.alive
        with Outage(postgres_url, url):
            stack.stop()
    assert not child.alive


@pytest.mark.parametrize("world", [1], indirect=True)
def test_above_the_limit_it_is_not_started_and_says_so(world: World) -> None:
    _, full = world.full_version()
    world.engines.start_base("tiny")
    with world.ledger.begin() as session:
        engines.demand_serving(session, "gw_1", [full.id], 600)

    def told() -> str | None:
        with world.ledger.begin() as session:
            return engines.problem(session, full.id)

    world.until(lambda: told() is not None)
    assert told() == "RATCHET_MAX_ENGINES allows 1 engines, and as many run."
    world.until(lambda: "tiny" in world.replicas())
    assert set(world.replicas()) == {"tiny"}


def test_an_engine_is_told_what_to_run_instead_of_its_base(tmp_path: Path) -> None:
    whole = WholeModel(
        id="ver_1", served_name="a-v1-00000000", base_model="tiny", manifest_sha256="0" * 64, folder=None
    )
    engine = Engine(Settings(home=tmp_path), "tiny", "engine-a-v1-00000000", whole)
    command = engine.component.command()
    assert command[3] == "tiny"
    assert WholeModel.model_validate_json(command[-1]) == whole
    assert (engine.runs, engine.served_name) == ("ver_1", "a-v1-00000000")


def test_what_is_not_the_base_with_other_values_never_becomes_an_engine(tmp_path: Path) -> None:
    base, candidate = tmp_path / "base", tmp_path / "candidate"
    write_base(base)
    shutil.copytree(base, candidate)
    (candidate / "tokenizer.json").write_text("{}")
    whole = WholeModel(
        id="upd_1",
        served_name="cand-upd_1",
        base_model=str(base),
        manifest_sha256=None,
        folder=str(candidate),
    )
    engine = Engine(Settings(home=tmp_path), str(base), "engine-cand-upd_1", whole)
    ended = subprocess.run(
        engine.component.command(),
        env=engine.component.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"error: {candidate}/tokenizer.json: differs from the base model's."
    )
