"""How Alembic reaches the ledger: one transaction for the whole run, on SQLite as on PostgreSQL."""

from sqlite3 import Connection as SqliteConnection

from alembic import context
from sqlalchemy import Connection, event, text

from domain.settings import Settings
from registry.session import make_engine
from registry.tables import Base

ADVISORY_LOCK = 7_274_630_210
"""Arbitrary; makes several processes that migrate one PostgreSQL database wait for each other."""


def run() -> None:
    url = context.config.attributes.get("url") or Settings().resolved_database_url
    engine = make_engine(url)
    sqlite = engine.dialect.name == "sqlite"
    if sqlite:
        event.listen(engine, "connect", _foreign_keys_off)
    try:
        with engine.begin() as connection:
            if not sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                compare_type=True,
                render_as_batch=True,
            )
            with context.begin_transaction():
                context.run_migrations()
            if sqlite:
                _require_foreign_keys(connection)
    finally:
        engine.dispose()


def _foreign_keys_off(connection: SqliteConnection, _record: object) -> None:
    """SQLite changes a constraint by copying its table and dropping the old one, which other tables refer to.

    Has no effect inside a transaction, hence on connecting.
    """
    connection.execute("PRAGMA foreign_keys = OFF")


def _require_foreign_keys(connection: Connection) -> None:
    broken = connection.execute(text("PRAGMA foreign_key_check")).all()
    if broken:
        tables = sorted({row[0] for row in broken})
        raise RuntimeError(f"{len(broken)} rows of {', '.join(tables)} refer to rows that do not exist")


run()
