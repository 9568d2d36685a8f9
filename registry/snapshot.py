"""Copies of the whole ledger while it is in use, and their way back: SQLite by its backup API, PostgreSQL by
pg_dump and pg_restore."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from domain.errors import Conflict, InvalidInput, NotFound
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
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        engine.dispose()
        raise InvalidInput(f"The ledger cannot be read: {error}", param="database_url") from error
    try:
        newest = ScriptDirectory.from_config(alembic_config(url)).get_current_head()
        if found != newest:
            raise Conflict(
                f"The ledger is at migration {found}, this program at {newest}: start `ratchet up` of this "
                "version once, or use the program that wrote it.",
                code="ledger_revision",
            )
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
    try:
        with Session(engine) as session:
            exported = session.execute(text("SELECT pg_export_snapshot()")).scalar_one()
            found = version_files(session)
            # pg_dump looks through this transaction's eyes, so that rows and list are of one moment.
            _run(url, "pg_dump", "--format=custom", f"--snapshot={exported}", f"--file={target}")
    finally:
        engine.dispose()
    return found


def restore(target_url: str, snapshot_file: Path) -> None:
    """Make the snapshot the ledger at `target_url`, which must be empty: no file, or no tables.

    Raises Conflict.
    """
    if kind_of(target_url) == "sqlite":
        path = Path(make_url(target_url).database or "")
        if path.exists():
            raise Conflict(f"There is a ledger at {path} already.", code="not_empty")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot_file, path)
        _require_sound(path)
        return
    engine = create_engine(target_url)
    try:
        tables = inspect(engine).get_table_names()
    except SQLAlchemyError as error:
        raise Conflict(f"The database does not answer: {error}", code="database_unavailable") from error
    finally:
        engine.dispose()
    if tables:
        raise Conflict("The database has tables already.", param="database_url", code="not_empty")
    name = make_url(target_url).database or ""
    flags = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges")
    _run(target_url, "pg_restore", *flags, f"--dbname={name}", str(snapshot_file))


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


def _require_sound(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as connection:
            [found] = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise Conflict(f"{path} is damaged: {found}", code="damaged_ledger")


def _run(url: str, program: str, *arguments: str) -> None:
    """One of PostgreSQL's tools against the database at `url`; its password is on no command line."""
    found = shutil.which(program)
    if found is None:
        raise Conflict(
            f"{program} is not on the PATH: install the client tools of your PostgreSQL.", code="no_pg_tools"
        )
    ended = subprocess.run(
        [found, *arguments], env=os.environ | _libpq(make_url(url)), capture_output=True, text=True
    )
    if ended.returncode != 0:
        raise Conflict(f"{program} failed: {ended.stderr.strip()}", code="pg_tools_failed")


def _libpq(url: URL) -> dict[str, str]:
    """libpq's environment variables for a SQLAlchemy URL."""
    host = url.host or url.query.get("host")
    values = {
        "PGHOST": host if isinstance(host, str) else None,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGDATABASE": url.database,
    }
    return {name: value for name, value in values.items() if value}
