"""How Alembic reaches the ledger: one transaction for the whole run, on SQLite as on PostgreSQL."""

from alembic import context
from sqlalchemy import text

from domain.settings import Settings
from registry.session import make_engine
from registry.tables import Base

ADVISORY_LOCK = 7_274_630_210
"""Arbitrary; makes several processes that migrate one PostgreSQL database wait for each other."""


def run() -> None:
    url = context.config.attributes.get("url") or Settings().resolved_database_url
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                compare_type=True,
                render_as_batch=True,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


run()
