"""A PostgreSQL that does not answer ends every wait for it; one that is only slow ends none."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from psycopg.errors import ConnectionTimeout
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from registry import postgresql
from registry.session import is_away, make_engine
from tests.conftest_databases import NewDatabase
from tests.faults.postgres import server_of
from tests.swallowing_proxy import BOUND, SILENCE, SwallowingProxy, impatient, proxied, swallowing


@pytest.fixture
def path(new_postgresql: NewDatabase) -> Iterator[tuple[Engine, SwallowingProxy]]:
    with proxied(new_postgresql(True)) as (url, proxy):
        engine = make_engine(url)
        yield engine, proxy
        engine.dispose()


@contextmanager
def frozen(server: psutil.Process) -> Iterator[None]:
    """The server with all of its processes stands still: the kernel goes on acknowledging for it."""
    stopped = [server, *server.children()]
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            os.kill(process.pid, signal.SIGCONT)


def team_name(engine: Engine) -> str:
    with engine.connect() as connection:
        name: str = connection.execute(text("SELECT name FROM teams")).scalar_one()
    return name


def seconds_until_away(engine: Engine) -> float:
    began = time.monotonic()
    with pytest.raises(OperationalError) as caught:
        team_name(engine)
    assert is_away(caught.value)
    return time.monotonic() - began


def await_well(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert team_name(engine) == "default"
        except OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def test_the_kernel_watches_the_path(path: tuple[Engine, SwallowingProxy]) -> None:
    engine, _ = path
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as one:
            found = [
                one.getsockopt(level, option)
                for level, option in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                )
            ]
    assert found == [1, 10, 5, 3, 20_000]


def test_a_path_that_swallows_everything_ends_in_time_for_everyone(
    path: tuple[Engine, SwallowingProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "AGAIN_SECONDS", 600.0)
    engine, proxy = path
    assert team_name(engine) == "default"
    with swallowing(proxy):
        # The pooled connection is silent, so is another one, and so is the attempt to replace it.
        assert seconds_until_away(engine) < BOUND
        # Whoever comes next does not wait for the same.
        with pytest.raises(OperationalError, match="did not answer just now"):
            team_name(engine)


def test_a_path_that_swallowed_everything_is_tried_again_and_heals(
    path: tuple[Engine, SwallowingProxy],
) -> None:
    engine, proxy = path
    with swallowing(proxy):
        seconds_until_away(engine)
        time.sleep(postgresql.AGAIN_SECONDS)
        with pytest.raises(OperationalError) as caught:
            team_name(engine)
        assert isinstance(caught.value.orig, ConnectionTimeout)
    await_well(engine)


def test_a_path_lost_within_a_transaction_ends_it(path: tuple[Engine, SwallowingProxy]) -> None:
    engine, proxy = path
    with engine.connect() as connection:
        connection.execute(text("UPDATE teams SET name = 'lost'"))
        with swallowing(proxy):
            began = time.monotonic()
            with pytest.raises(OperationalError, match="PostgreSQL said nothing for"):
                connection.execute(text("SELECT 1"))
            assert time.monotonic() - began < BOUND
    await_well(engine)


def test_a_server_that_stands_still_ends_in_time_and_heals(new_postgresql: NewDatabase) -> None:
    engine = make_engine(new_postgresql(True))
    server = server_of(engine)
    assert server is not None
    with impatient(), frozen(server):
        assert seconds_until_away(engine) < BOUND
    await_well(engine)
    engine.dispose()


def test_a_long_statement_is_not_cut(
    path: tuple[Engine, SwallowingProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server answers others is asked every half a second, and it may take its time."""
    engine, _ = path
    monkeypatch.setattr(postgresql, "SILENCE_SECONDS", SILENCE)
    monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 60)
    with engine.connect() as connection:
        began = time.monotonic()
        connection.execute(text(f"SELECT pg_sleep({5 * SILENCE})"))
        assert time.monotonic() - began >= 5 * SILENCE


def test_a_url_may_say_otherwise(new_postgresql: NewDatabase) -> None:
    engine = make_engine(f"{new_postgresql(True)}&connect_timeout=17")
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        assert driver.info.get_parameters()["connect_timeout"] == "17"
    engine.dispose()


def test_what_counts_as_away(path: tuple[Engine, SwallowingProxy], new_sqlite: NewDatabase) -> None:
    """A statement that cannot work is a defect, on both databases."""
    for engine in (path[0], make_engine(new_sqlite(True))):
        with engine.connect() as connection, pytest.raises(Exception, match="no_such_table") as caught:
            connection.execute(text("SELECT * FROM no_such_table"))
        assert not is_away(caught.value)  # type: ignore[arg-type]
        engine.dispose()
