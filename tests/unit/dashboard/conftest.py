"""The real application over a migrated SQLite ledger; no engine runs, so nothing is ever loaded."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from api import rollback
from api.app import create_app
from domain.settings import Settings
from registry.session import make_engine, make_sessions, upgrade
from tests.conftest_databases import NewDatabase
from tests.seeded_story import Files, Story, tell

ADDRESS = "http://127.0.0.1:8400"


@dataclass(frozen=True)
class Site:
    client: TestClient
    sessions: sessionmaker[Session]
    home: Path


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Story]:
    """A home with the story in it; tests work on copies."""
    home = tmp_path_factory.mktemp("told")
    url = f"sqlite:///{home / 'ratchet.db'}"
    upgrade(url)
    engine = make_engine(url)
    story = tell(make_sessions(engine), Files(home / "artifacts", home / "staging"))
    engine.dispose()
    return home, story


@contextmanager
def _site(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(rollback, "SERVING_SECONDS", 0.05)
    settings = Settings(home=home, broker_url="redis+socket:///nowhere.sock")
    engine = make_engine(settings.resolved_database_url)
    with TestClient(create_app(settings), base_url=ADDRESS, follow_redirects=False) as client:
        yield Site(client, make_sessions(engine), home)
    engine.dispose()


@pytest.fixture
def empty_site(tmp_path: Path, new_sqlite: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    shutil.copy(new_sqlite(True).removeprefix("sqlite:///"), tmp_path / "ratchet.db")
    with _site(tmp_path, monkeypatch) as site:
        yield site


@pytest.fixture
def site(told: tuple[Path, Story], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    shutil.copytree(told[0], tmp_path, dirs_exist_ok=True)
    with _site(tmp_path, monkeypatch) as site:
        yield site


@pytest.fixture
def story(told: tuple[Path, Story]) -> Story:
    return told[1]
