"""Connections to the ledger, its clock and its migrations; SQLite and PostgreSQL alike."""

from importlib import resources
from sqlite3 import SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE, SQLITE_ERROR
from sqlite3 import Connection as SqliteConnection
from sqlite3 import Error as SqliteError
from sqlite3 import IntegrityError as SqliteIntegrityError
from typing import Any

from alembic import command
from alembic.config import Config
from psycopg import Connection as PostgresqlConnection
from psycopg.errors import UniqueViolation
from sqlalchemy import Connection, Engine, Float, create_engine, event, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from registry import postgresql

SQLITE_BUSY_MS = 30_000
POSTGRESQL_IDLE_MS = 60_000
_READING = "ratchet_reading"

LedgerError = SQLAlchemyError
"""Base of what a session raises that cannot do its work: the database is away or restarts, its disk is full,
its lock held for too long."""


class clock(FunctionElement[float]):
    """The database's clock as float unix seconds, usable inside a statement."""

    name = "clock"
    type = Float()
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: SQLCompiler, **kw: Any) -> str:
    # unixepoch('subsec') would need SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: SQLCompiler, **kw: Any) -> str:
    # now() would stand still for the length of a transaction.
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def make_engine(url: str) -> Engine:
    """An engine whose SQLite connections are durable, enforce foreign keys and write-lock at BEGIN.

    `make_reading_sessions` has the exception: transactions that only read.
    """
    if url.startswith("sqlite"):
        engine = create_engine(url)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = create_engine(url, pool_pre_ping=True, pool_timeout=postgresql.POOL_SECONDS)
        postgresql.bound_waits(engine)
        event.listen(engine, "connect", _configure_postgresql)
    return engine


def _configure_postgresql(connection: PostgresqlConnection, _record: object) -> None:
    # A process that is frozen within a transaction would hold its rows for ever, and with them its
    # assistant's line of updates.
    connection.execute(f"SET idle_in_transaction_session_timeout = {POSTGRESQL_IDLE_MS}")
    connection.commit()


def _configure_sqlite(connection: SqliteConnection, _record: object) -> None:
    # The driver's own implicit BEGIN is deferred: a read that turns into a write would fail at once
    # with "database is locked" instead of waiting its turn.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A reader begins without the write lock, and on a connection that refuses to write: only a read that
    turns into a write could meet a snapshot too old to write on."""
    reading = connection.get_execution_options().get(_READING, False)
    if connection.info.get(_READING, False) != reading:
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if reading else 'OFF'}")
        connection.info[_READING] = reading
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions whose rows stay readable after the edge has committed."""
    return sessionmaker(engine, expire_on_commit=False)


def make_reading_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions that only read: they wait for no writer, hold up none, and see the one state of the ledger
    at their first statement. A write in one fails on both databases."""
    if engine.dialect.name == "sqlite":
        reading = engine.execution_options(**{_READING: True})
    else:
        reading = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return make_sessions(reading)


def db_now(session: Session) -> float:
    """Unix seconds by the database's clock: leases and times never trust a worker's own clock."""
    return session.execute(select(clock())).scalar_one()


def violates_unique(error: IntegrityError) -> bool:
    """Whether a unique constraint was the one broken, rather than a foreign key or a check."""
    cause = error.orig
    if isinstance(cause, SqliteIntegrityError):
        return cause.sqlite_errorcode in (SQLITE_CONSTRAINT_UNIQUE, SQLITE_CONSTRAINT_PRIMARYKEY)
    return isinstance(cause, UniqueViolation)


def is_away(error: LedgerError) -> bool:
    """Whether the database rather than the statement is to blame, so that the same may work later: it does
    not answer, ends the connection, has no connection free, no room, or a lock held for too long."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, SqliteError):
        # SQLite calls a statement that it cannot run an OperationalError too.
        return isinstance(error, OperationalError) and error.orig.sqlite_errorcode != SQLITE_ERROR
    return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))


def upgrade(url: str) -> None:
    """Bring the database at `url` to the newest migration; safe to run from several processes at once."""
    command.upgrade(alembic_config(url), "head")


def alembic_config(url: str) -> Config:
    """Alembic's configuration for `url`, its scripts found in the installed `migrations` package."""
    config = Config()
    with resources.as_file(resources.files("migrations")) as folder:
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["url"] = url
    return config
