"""Copies of the whole ledger while it is in use, and their way back: SQLite by its backup API, PostgreSQL by
pg_dump and pg_restore."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from domain.errors import Conflict, InvalidInput, NotFound
from registry import postgres_tools, postgresql
from registry.retention import VersionFiles, version_files
from registry.session import alembic_config, make_engine

DatabaseKind = Literal["sqlite", "postgresql"]


def kind_of(url: str) -> DatabaseKind:
    return "sqlite" if make_url(url).get_backend_name() == "sqlite" else "postgresql"


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """An existing ledger that this code understands; nothing is created or migrated.

    Raises NotFound when there is none, Conflict(code="ledger_revision") for another schema,
    InvalidInput when the database does not answer.
    """
    path = make_url(url).database
    if kind_of(url) == "sqlite" and not (path and Path(path).is_file()):
        raise NotFound(f"There is no ledger at {path}.", param="database_url")
    engine = make_engine(url)
    try:
        try:
            with engine.connect() as connection:
                _require_revision(
                    connection,
                    url,
                    "start `ratchet up` of this version once, or use the program that wrote it",
                )
        except SQLAlchemyError as error:
            raise InvalidInput(f"The ledger cannot be read: {error}", param="database_url") from error
        yield engine
    finally:
        engine.dispose()


def snapshot(url: str, target: Path) -> list[VersionFiles]:
    """Write the ledger as it is at one moment to the new file `target`; returns that moment's versions.

    Nobody who uses the ledger waits for it. Raises Conflict when the copy is not sound or the tools fail.
    """
    if kind_of(url) == "sqlite":
        return _snapshot_sqlite(url, target)
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    postgresql.bound_waits(engine)
    try:
        with Session(engine) as session:
            exported = session.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            found = version_files(session)
            # It looks through this transaction's eyes, so that rows and list are of one moment.
            postgres_tools.dump(url, exported, target)
    finally:
        engine.dispose()
    return found


@contextmanager
def restored(target_url: str, snapshot_file: Path) -> Iterator[list[VersionFiles]]:
    """Make the snapshot the ledger at `target_url`, which must be empty: no file, or no tables. Yields the
    versions that it knows.

    The block decides: when it ends with an error, the target is as empty as before. On PostgreSQL all of it
    is one transaction, so that the end of this process does the same. Raises Conflict.
    """
    if kind_of(target_url) == "sqlite":
        with _restored_sqlite(Path(make_url(target_url).database or ""), snapshot_file) as versions:
            yield versions
        return
    engine = create_engine(target_url)
    postgresql.bound_waits(engine)
    try:
        with engine.begin() as connection:
            if inspect(connection).get_table_names():
                raise Conflict("The database has tables already.", param="database_url", code="not_empty")
            postgres_tools.replay(connection, snapshot_file)
            _require_revision(connection, target_url, "use the program that wrote it")
            with Session(connection) as session:
                versions = version_files(session)
            yield versions
    except SQLAlchemyError as error:
        raise Conflict(f"The database does not answer: {error}", code="database_unavailable") from error
    finally:
        engine.dispose()


@contextmanager
def _restored_sqlite(path: Path, snapshot_file: Path) -> Iterator[list[VersionFiles]]:
    if path.exists():
        raise Conflict(f"There is a ledger at {path} already.", code="not_empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}")
    try:
        shutil.copyfile(snapshot_file, path)
        _require_sound(path)
        with engine.connect() as connection:
            _require_revision(connection, str(engine.url), "use the program that wrote it")
            with Session(connection) as session:
                versions = version_files(session)
            yield versions
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        engine.dispose()


def _snapshot_sqlite(url: str, target: Path) -> list[VersionFiles]:
    source = make_url(url).database or ""
    with (
        closing(sqlite3.connect(f"file:{Path(source).resolve()}?mode=ro", uri=True)) as live,
        closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy)
        # One file, without a log beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
    _require_sound(target)
    engine = create_engine(f"sqlite:///{target}")
    try:
        with Session(engine) as session:
            return version_files(session)
    finally:
        engine.dispose()


def _require_revision(connection: Connection, url: str, advice: str) -> None:
    """Raises Conflict(code="ledger_revision") unless the ledger's schema is this program's."""
    found = MigrationContext.configure(connection).get_current_revision()
    newest = ScriptDirectory.from_config(alembic_config(url)).get_current_head()
    if found != newest:
        raise Conflict(
            f"The ledger is at migration {found}, this program at {newest}: {advice}.", code="ledger_revision"
        )


def _require_sound(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as connection:
            [found] = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise Conflict(f"{path} is damaged: {found}", code="damaged_ledger")
