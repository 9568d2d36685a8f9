"""pg_dump and pg_restore, PostgreSQL's own client tools, against the database that a URL names."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psycopg
from sqlalchemy.engine import URL, Connection, make_url

from domain.errors import Conflict

_END_OF_COPY = b"\\.\n"
_GUARDS = (b"\\restrict ", b"\\unrestrict ")
"""Lines for psql alone: between them it takes no other backslash command."""


def dump(url: str, snapshot: str, target: Path) -> None:
    """Write what the transaction that exported `snapshot` sees to the new file `target`. Raises Conflict."""
    arguments = [_found("pg_dump"), "--format=custom", f"--snapshot={snapshot}", f"--file={target}"]
    ended = subprocess.run(arguments, env=os.environ | _libpq(make_url(url)), capture_output=True, text=True)
    if ended.returncode != 0:
        raise Conflict(f"pg_dump failed: {ended.stderr.strip()}", code="pg_tools_failed")


def replay(connection: Connection, dump_file: Path) -> None:
    """Make again what is in the dump, within the connection's own transaction, which pg_restore, having a
    connection of its own, could not. Raises Conflict; the transaction is then fit for a rollback alone."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    try:
        with _script(dump_file) as lines, driver.cursor() as cursor:
            statements: list[bytes] = []
            for line in lines:
                if line.startswith(b"COPY ") and line.endswith(b" FROM stdin;\n"):
                    _execute(cursor, statements)
                    with cursor.copy(line) as copy:
                        for row in _rows(lines):
                            copy.write(row)
                elif not line.startswith(_GUARDS):
                    statements.append(line)
            _execute(cursor, statements)
            # The script's own, as an empty search path, are not for who looks at the result.
            cursor.execute("RESET ALL")
    except psycopg.Error as error:
        raise Conflict(f"The dump cannot be restored: {error}", code="pg_tools_failed") from error


@contextmanager
def _script(dump_file: Path) -> Iterator[IO[bytes]]:
    """The dump as SQL, with each table's rows after a COPY and a line with `\\.` after them."""
    command = [_found("pg_restore"), "--no-owner", "--no-privileges", "--file=-", str(dump_file)]
    with tempfile.TemporaryFile() as told:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode != 0:
            told.seek(0)
            words = told.read().decode(errors="replace").strip()
            raise Conflict(f"pg_restore failed: {words}", code="pg_tools_failed")


def _rows(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line == _END_OF_COPY:
            return
        yield line


def _execute(cursor: psycopg.Cursor[object], statements: list[bytes]) -> None:
    if statements:
        cursor.execute(b"".join(statements))
        statements.clear()


def _found(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Conflict(
            f"{program} is not on the PATH: install the client tools of your PostgreSQL.", code="no_pg_tools"
        )
    return found


def _libpq(url: URL) -> dict[str, str]:
    """libpq's environment variables for a SQLAlchemy URL: a password belongs on no command line."""
    host = url.host or url.query.get("host")
    values = {
        "PGHOST": host if isinstance(host, str) else None,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGDATABASE": url.database,
    }
    return {name: value for name, value in values.items() if value}
