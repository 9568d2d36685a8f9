"""Migrations up and down keep every row, and refuse a ledger whose references are broken."""

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, MetaData, text
from sqlalchemy.exc import DBAPIError

from registry.session import alembic_config, make_engine, make_sessions, upgrade
from tests import seeded_story
from tests.conftest_databases import NewDatabase

UNUSED = {"idempotency_keys", "replicas"}
"""Tables that the story has no row for."""
Rows = dict[str, list[dict[str, object]]]


def stored(engine: Engine) -> Rows:
    """Every row of every table, as the database itself describes them."""
    metadata = MetaData()
    metadata.reflect(engine)
    with engine.begin() as connection:
        return {
            name: sorted((dict(row) for row in connection.execute(table.select()).mappings()), key=repr)
            for name, table in metadata.tables.items()
            if name != "alembic_version"
        }


def test_all_the_way_down_to_the_first_ledger_and_up_again(new_database: NewDatabase, tmp_path: Path) -> None:
    url = new_database(True)
    engine = make_engine(url)
    seeded_story.tell(make_sessions(engine), seeded_story.Files(tmp_path / "artifacts", tmp_path / "staging"))
    new = stored(engine)
    assert len(new["demonstrations"]) == 190
    assert len(new["versions"]) == 4
    engine.dispose()

    command.downgrade(alembic_config(url), "0001")
    old = stored(engine)
    assert old.keys() < new.keys()
    for table, rows in old.items():
        assert rows or table in UNUSED, f"the story should fill {table}"
        kept = set(rows[0]) if rows else set()
        assert rows == sorted(({k: v for k, v in row.items() if k in kept} for row in new[table]), key=repr)
    engine.dispose()

    upgrade(url)
    assert stored(engine) == new
    assert [(row["train_demonstrations"], row["holdout_demonstrations"]) for row in new["skills"]] == [
        split_counts(new, row["id"]) for row in new["skills"]
    ]
    for table in ("audit_logs", "alias_moves"):
        with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(text(f"DELETE FROM {table}"))
    engine.dispose()


def split_counts(rows: Rows, skill_id: object) -> tuple[int, int]:
    splits = [row["split"] for row in rows["demonstrations"] if row["skill_id"] == skill_id]
    return splits.count("train"), splits.count("holdout")


def test_broken_references_stop_a_migration(new_sqlite: NewDatabase) -> None:
    """SQLite's foreign keys are off while its tables are rebuilt: what was broken before must not pass."""
    url = new_sqlite(True)
    command.downgrade(alembic_config(url), "0001")
    engine = make_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql(
            "INSERT INTO batches (id, team_id, skill_id, accepted, duplicates, created_at) "
            "VALUES ('batch_1', 'team_default', 'nobody', 0, 0, 0)"
        )
        connection.exec_driver_sql("BEGIN")
    engine.dispose()
    with pytest.raises(RuntimeError, match="1 rows of batches"):
        upgrade(url)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "0001"
    engine.dispose()
