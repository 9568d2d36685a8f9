"""The two databases behave as the verbs assume."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from registry.session import db_now, make_engine, make_sessions, violates_unique
from tests.unit.registry.steps import Ledger


def test_clock_is_the_databases_and_moves_within_a_transaction(ledger: Ledger) -> None:
    with ledger.begin() as session:
        before = time.time()
        first = db_now(session)
        while db_now(session) == first:
            assert time.time() - before < 60
        assert before - 0.01 <= first <= db_now(session) <= time.time() + 0.01


def test_sqlite_is_durable_and_checks_foreign_keys(new_sqlite) -> None:
    with make_engine(new_sqlite(True)).connect() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_postgresql_ends_a_transaction_that_its_client_forgot(new_postgresql) -> None:
    with make_engine(new_postgresql(True)).connect() as connection:
        limit = connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one()
    assert limit == "1min"


def test_sqlite_takes_the_write_lock_when_a_transaction_begins(new_sqlite) -> None:
    url = new_sqlite(True)
    ours, other = make_engine(url), create_engine(url, connect_args={"timeout": 0})
    with ours.begin() as connection:
        connection.execute(text("SELECT 1"))
        with pytest.raises(OperationalError, match="locked"), other.begin() as second:
            second.execute(text("UPDATE teams SET name = 'x'"))


def test_only_unique_violations_count_as_unique_violations(ledger: Ledger) -> None:
    same = "INSERT INTO teams (id, name, created_at) VALUES ('t2', 'default', 0)"
    orphan = (
        "INSERT INTO assistants (id, team_id, name, base_model, parameter_count, context_window, "
        "next_version, created_at) VALUES ('a', 'nobody', 'a', 'b', 1, 1, 1, 0)"
    )
    found = {}
    for name, statement in {"same": same, "orphan": orphan}.items():
        with pytest.raises(IntegrityError) as caught, ledger.begin() as session:
            session.execute(text(statement))
        found[name] = violates_unique(caught.value)
    assert found == {"same": True, "orphan": False}


def test_an_error_rolls_everything_back(ledger: Ledger) -> None:
    def change() -> None:
        with ledger.begin() as session:
            session.execute(text("UPDATE teams SET name = 'changed'"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    with ledger.begin() as session:
        assert session.execute(text("SELECT name FROM teams")).scalar_one() == "default"


def test_upgrade_finds_its_migrations_from_any_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", "import sys; from registry.session import upgrade; upgrade(sys.argv[1])", url],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
        timeout=240,
    )
    engine = make_engine(url)
    assert "serving_states" in inspect(engine).get_table_names()
    with make_sessions(engine).begin() as session:
        assert session.execute(text("SELECT id FROM teams")).scalars().all() == ["team_default"]
