"""fsck, backup, restore and retention where versions are whole models and adapters that lie on them: in
folders and in a bucket, by the command itself."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from artifacts.opening import open_store
from artifacts.sweep import Swept, sweep
from artifacts.version_store import VersionStore
from cli.engine_start import verified
from cli.main import app
from domain.recipe import Recipe
from domain.settings import Settings
from domain.version import Checkpoint, VersionKind, WholeModel
from registry import aliases, retention, versions
from registry.session import make_reading_sessions
from registry.tables import Assistant, Skill, Version
from tests.conftest_databases import NewDatabase
from tests.conftest_s3 import Prefix
from tests.unit.artifacts.conftest import safetensors
from tests.unit.registry.steps import PASS, Ledger, lines
from worker.housekeeping import Housekeeper

GRACE_HOURS = 0.0001
"""0.36 s."""


def write_full(folder: Path, number: int) -> Path:
    """A whole model in two shards, but for its `number` like any other of the base."""
    folder.mkdir(parents=True)
    weight_map = {
        "model.embed.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    for tensor, file in weight_map.items():
        (folder / file).write_bytes(safetensors(bytes([number]) * 16, tensor))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_adapter(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(safetensors(bytes([number]) * 8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    return folder


WEIGHTS = {"full": "model-00002-of-00002.safetensors", "adapter": "adapter_model.safetensors"}


@dataclass(frozen=True)
class Home:
    """An installation whose versions are in folders below it, or in `bucket`."""

    path: Path
    bucket: Prefix | None

    @property
    def environment(self) -> dict[str, str]:
        named = {} if self.bucket is None else {"RATCHET_ARTIFACTS_URL": self.bucket.url}
        return {"RATCHET_HOME": str(self.path), "RATCHET_ARTIFACTS_GRACE_HOURS": str(GRACE_HOURS), **named}

    @property
    def settings(self) -> Settings:
        url = None if self.bucket is None else self.bucket.url
        return Settings(home=self.path, artifacts_url=url, keep_versions=1, artifacts_grace_hours=GRACE_HOURS)

    @property
    def store(self) -> VersionStore:
        return open_store(self.settings)

    def run(self, *arguments: str) -> tuple[int, Any]:
        """Exit status, and what `--json` printed (else the error line)."""
        result = CliRunner().invoke(app, [*arguments, "--json"], env=self.environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr

    def findings(self) -> list[tuple[str, str | None, str]]:
        _, told = self.run("fsck")
        return [(one["kind"], one["version"], one["message"]) for one in told["findings"]]

    def flip(self, version: Version) -> None:
        """One bit of its weights where they are kept; twice is none."""
        name = WEIGHTS[version.kind]
        if self.bucket is not None:
            [file] = [file for file in version.manifest["files"] if file["path"] == name]
            self.bucket.flip(f"{version.id}/{file['sha256']}")
            return
        path = self.path / "artifacts" / version.id / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def kept(self) -> set[str]:
        return {one.version_id for one in self.store.stored()}


class Line:
    """One assistant's versions, published with real files: v1 full, v2 and v3 adapters on it, v4 full and
    v5 an adapter on that one, the champion."""

    def __init__(self, home: Home, work: Path) -> None:
        self.home, self._work = home, work
        self.ledger = Ledger(home.settings.resolved_database_url)
        self.assistant: Assistant = self.ledger.assistant()
        self._skill: Skill = self.ledger.skill(self.assistant)
        self.full = self._publish(1, "full", None)
        self.on_full = [self._publish(number, "adapter", self.full) for number in (2, 3)]
        self.second_full = self._publish(4, "full", None)
        self.champion = self._publish(5, "adapter", self.second_full)

    @property
    def all(self) -> list[Version]:
        return [self.full, *self.on_full, self.second_full, self.champion]

    def point(self, alias: str, version: Version) -> None:
        with self.ledger.begin() as session:
            move = {"kind": "promote", "reason": "", "actor": "user", "expected_revision": None}
            aliases.move_alias(session, self.assistant, alias, version, **move)

    def _publish(self, number: int, kind: VersionKind, below: Version | None) -> Version:
        ledger = self.ledger
        ledger.teach(self.assistant, self._skill, lines(10 * number, 10 * number + 2))
        claim = ledger.must_claim(ledger.queue(self.assistant, [self._skill.name]))
        with ledger.begin() as session:
            version_id, _ = versions.allocate_version(session, claim)
        checkpoint = (
            None
            if below is None
            else Checkpoint(version_id=below.id, manifest_sha256=below.manifest_sha256 or "")
        )
        write = write_full if kind == "full" else write_adapter
        manifest, sha256 = self.home.store.publish(
            write(self._work / version_id, number),
            version_id=version_id,
            kind=kind,
            base_model="tiny",
            update_id=claim.update_id,
            checkpoint=checkpoint,
        )
        with ledger.begin() as session:
            version = versions.publish(
                session,
                claim,
                version_id=version_id,
                number=number,
                served_name=f"helper-v{number}-{sha256[:8]}",
                manifest=manifest,
                manifest_sha256=sha256,
                recipe=Recipe(),
                verdict=PASS,
                measurements=[],
                move_champion=True,
            )
        ledger.finish(claim)
        return version


@pytest.fixture(params=["folders", "bucket"])
def home(request: pytest.FixtureRequest, tmp_path: Path, new_sqlite: NewDatabase) -> Home:
    bucket = request.getfixturevalue("s3_prefix") if request.param == "bucket" else None
    path = tmp_path / "home"
    path.mkdir()
    shutil.copy(new_sqlite(True).removeprefix("sqlite:///"), path / "ratchet.db")
    return Home(path, bucket)


@pytest.fixture
def line(home: Home, tmp_path: Path) -> Iterator[Line]:
    made = Line(home, tmp_path / "work")
    yield made
    made.ledger.engine.dispose()


@pytest.fixture
def target(home: Home, tmp_path: Path) -> Home:
    """Where to restore: another home, and another part of the bucket."""
    bucket = None if home.bucket is None else Prefix(home.bucket.client, f"{home.bucket.name}-restored")
    return Home(tmp_path / "restored", bucket)


def test_fsck_reads_whole_models_and_what_lies_on_them(home: Home, line: Line) -> None:
    assert home.run("fsck") == (0, {"object": "fsck", "versions": 5, "status": 0, "findings": []})
    line.point("stable", line.on_full[0])
    for version in line.all:
        home.flip(version)
        [found, *dangling] = home.findings()
        assert found[:2] == ("corrupt", f"helper@v{version.number}")
        assert WEIGHTS[version.kind] in found[2]
        told = [message for kind, _, message in dangling if kind == "dangling"]
        assert len(told) == len(dangling)
        assert (
            told
            == {
                1: ["'stable' points at helper@v2, which lies on helper@v1, which has no good files"],
                2: ["'stable' points at helper@v2, which has no good files"],
                3: [],
                4: ["'champion' points at helper@v5, which lies on helper@v4, which has no good files"],
                5: ["'champion' points at helper@v5, which has no good files"],
            }[version.number]
        )
        assert home.run("fsck")[0] == 4
        home.flip(version)
    home.store.delete(line.second_full.id)
    assert [found[:2] for found in home.findings()] == [
        ("missing", "helper@v4"),
        ("dangling", "helper@v5"),
    ]
    assert home.run("fsck", "--repair")[0] == 4
    assert home.kept() == {version.id for version in line.all} - {line.second_full.id}


def test_fsck_finds_an_adapter_whose_whole_model_was_let_go(home: Home, line: Line) -> None:
    """Retention never does so; somebody's own SQL might."""
    with line.ledger.begin() as session:
        session.get_one(Version, line.second_full.id).pruned_at = 1.0
    home.store.delete(line.second_full.id)
    assert home.findings() == [
        ("missing", "helper@v5", "helper@v5: helper@v4, on which it lies, was let go"),
        ("dangling", "helper@v5", "'champion' points at helper@v5, which has no good files"),
    ]


def test_a_restored_whole_model_serves_and_so_does_what_lies_on_it(
    home: Home, target: Home, line: Line, tmp_path: Path
) -> None:
    assert home.run("backup", str(tmp_path / "backup"))[1]["versions"] == 5
    assert target.run("restore", str(tmp_path / "backup"))[0] == 0
    assert target.run("fsck") == (0, {"object": "fsck", "versions": 5, "status": 0, "findings": []})
    assert target.kept() == {version.id for version in line.all}
    base = write_full(tmp_path / "base", 0)
    restored = Ledger(target.settings.resolved_database_url)
    for version in (line.full, line.second_full):
        model = WholeModel(
            id=version.id,
            served_name=version.served_name,
            base_model="tiny",
            manifest_sha256=version.manifest_sha256,
            folder=None,
        )
        with ExitStack() as uses:  # as an engine starts
            folder = verified(target.settings, model, base, uses)
            expected = write_full(tmp_path / f"again-{version.number}", version.number)
            for path in expected.iterdir():
                assert (folder / path.name).read_bytes() == path.read_bytes()
    for version in (*line.on_full, line.champion):
        folder = target.store.verify(version.id, version.manifest_sha256 or "")
        manifest = json.loads((folder / "manifest.json").read_bytes())
        with restored.begin() as session:
            below = versions.get_version(session, line.assistant, 1 if version.number < 4 else 4)
            assert manifest["checkpoint"] == {
                "version_id": below.id,
                "manifest_sha256": below.manifest_sha256,
            }
    restored.engine.dispose()


def test_a_backup_without_the_whole_model_below_an_adapter_is_refused(
    home: Home, target: Home, line: Line, tmp_path: Path
) -> None:
    home.flip(line.full)
    status, told = home.run("backup", str(tmp_path / "none"))
    assert (status, WEIGHTS["full"] in told) == (1, True)
    home.flip(line.full)

    backup = tmp_path / "backup"
    assert home.run("backup", str(backup))[0] == 0
    described = json.loads((backup / "backup.json").read_text())
    described["versions"] = [one for one in described["versions"] if one["version_id"] != line.full.id]
    (backup / "backup.json").write_text(json.dumps(described))
    status, told = target.run("restore", str(backup))
    assert (status, "names helper@v1, whose files it does not have" in told) == (1, True)
    # What came to a store elsewhere went again, but not what had been there.
    assert not target.path.exists()
    if target.bucket is not None:
        assert target.bucket.keys() == []
        before = home.bucket.keys() if home.bucket is not None else []
        assert Home(target.path, home.bucket).run("restore", str(backup))[0] == 1
        assert home.bucket is not None
        assert home.bucket.keys() == before


def test_retention_lets_a_whole_model_go_after_what_lies_on_it(home: Home, line: Line) -> None:
    with line.ledger.begin() as session:
        retention.pin(session, line.on_full[0], pinned=True, actor="user")
    for version in line.all:
        home.store.verify(version.id, version.manifest_sha256 or "")  # a bucket's copies, for all
    time.sleep(2.5)  # the grace, and a bucket's clock of whole seconds
    first, pinned, other = line.full, *line.on_full
    # v5 serves and v4 is where a rollback goes.
    assert swept(home, line).pruned == [other.id]
    assert swept(home, line).pruned == []
    assert home.kept() == {first.id, pinned.id, line.second_full.id, line.champion.id}
    assert home.run("fsck") == (0, {"object": "fsck", "versions": 4, "status": 0, "findings": []})
    with line.ledger.begin() as session:
        retention.pin(session, pinned, pinned=False, actor="user")
    assert swept(home, line).pruned == [pinned.id]
    assert swept(home, line).pruned == [first.id]
    assert home.kept() == {line.second_full.id, line.champion.id}
    assert home.run("fsck") == (0, {"object": "fsck", "versions": 2, "status": 0, "findings": []})
    if home.bucket is not None:
        assert home.bucket.ids() == home.kept()
        copies = {path.name for path in home.settings.artifacts_cache_dir.glob("ver_*")}
        assert copies == home.kept()


def swept(home: Home, line: Line) -> Swept:
    housekeeper = Housekeeper(home.settings, line.ledger.sessions, make_reading_sessions(line.ledger.engine))
    return sweep(home.store, housekeeper, grace_seconds=GRACE_HOURS * 3600)
