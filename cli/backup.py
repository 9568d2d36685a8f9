"""`ratchet backup` and `ratchet restore`: the ledger of one moment and every file that it names, verified.

A backup is a folder: `ledger.db` or `ledger.dump`, `artifacts/<version id>/`, and `backup.json`, which is
written last, so that its presence means that the rest is whole.
"""

import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from artifacts.files import copy_durably, fsync, sha256_of
from artifacts.opening import open_store
from artifacts.store import ArtifactStore
from artifacts.version_store import VersionStore
from cli.errors import CliError
from cli.output import emit
from domain.errors import CorruptArtifact, RatchetError
from domain.settings import Settings
from registry import retention, snapshot
from registry.retention import VersionFiles
from registry.session import make_sessions
from registry.snapshot import DatabaseKind

DESCRIPTION = "backup.json"
LEDGER = {"sqlite": "ledger.db", "postgresql": "ledger.dump"}


class SavedVersion(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version_id: str
    manifest_sha256: str


class Backup(BaseModel):
    """What backup.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    created_at: int
    """Unix seconds."""
    database: DatabaseKind
    ledger_sha256: str
    versions: list[SavedVersion]


def back_up(folder: Path, settings: Settings, as_json: bool) -> None:
    """Fill the new or empty `folder`. Raises CliError."""
    _require_empty(folder)
    try:
        made = _save(settings, folder)
    except RatchetError as error:
        raise CliError(f"no backup was made: {error.message}") from error
    told = {"object": "backup", "folder": str(folder), "versions": len(made.versions)}
    emit(
        told, as_json, lambda: f"{folder}: the ledger and {len(made.versions)} versions, every byte compared"
    )


def bring_back(folder: Path, settings: Settings, as_json: bool) -> None:
    """Make the new or empty home of `settings` from the backup in `folder`. Raises CliError."""
    _require_empty(settings.home)
    try:
        found = _read(folder)
        _restore(settings, folder, found)
    except RatchetError as error:
        raise CliError(f"nothing was restored: {error.message}") from error
    except OSError as error:
        raise CliError(f"nothing was restored: {error}") from error
    told = {"object": "restore", "home": str(settings.home), "versions": len(found.versions)}
    emit(told, as_json, lambda: f"{settings.home}: the ledger and {len(found.versions)} versions, verified")


def _save(settings: Settings, folder: Path) -> Backup:
    url = settings.resolved_database_url
    kind = snapshot.kind_of(url)
    store = open_store(settings)
    with snapshot.opened(url) as live, make_sessions(live).begin() as session:
        for version in retention.version_files(session):
            if not version.pruned:
                # From here on retention leaves it alone, for as long as its grace.
                retention.use(session, version.version_id)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / LEDGER[kind]
    versions = [version for version in snapshot.snapshot(url, ledger) if not version.pruned]
    saved = ArtifactStore(folder / "artifacts")
    for version in versions:
        with store.held(version.version_id):
            _copy(store.verify(version.version_id, version.manifest_sha256), saved, version)
    made = Backup(
        created_at=int(time.time()),
        database=kind,
        ledger_sha256=sha256_of(ledger, durable=True),
        versions=[
            SavedVersion(version_id=one.version_id, manifest_sha256=one.manifest_sha256) for one in versions
        ],
    )
    partial = folder / f"{DESCRIPTION}.partial"
    partial.write_text(made.model_dump_json(indent=2) + "\n")
    fsync(partial)
    partial.rename(folder / DESCRIPTION)
    fsync(folder)
    return made


def _read(folder: Path) -> Backup:
    """The backup, every byte of it compared. Raises CliError, CorruptArtifact."""
    try:
        found = Backup.model_validate_json((folder / DESCRIPTION).read_bytes())
    except FileNotFoundError as error:
        raise CliError(f"{folder} is not a whole backup: it has no {DESCRIPTION}") from error
    except ValidationError as error:
        raise CliError(f"{folder / DESCRIPTION} is not what `ratchet backup` writes: {error}") from error
    ledger = folder / LEDGER[found.database]
    if not ledger.is_file() or sha256_of(ledger, durable=False) != found.ledger_sha256:
        raise CliError(f"{ledger} is missing or damaged")
    saved = ArtifactStore(folder / "artifacts")
    for version in found.versions:
        saved.verify(version.version_id, version.manifest_sha256)
    return found


def _restore(settings: Settings, folder: Path, found: Backup) -> None:
    """Fill a folder beside the home and the ledger, compare the one with the other, and rename the folder. An
    error leaves neither of them, nor files in a store elsewhere."""
    kind = snapshot.kind_of(settings.resolved_database_url)
    if kind != found.database:
        raise CliError(f"the backup is of {found.database}, but RATCHET_DATABASE_URL names {kind}")
    home = settings.home.absolute()
    arriving = home.with_name(f".{home.name}.restoring-{secrets.token_hex(4)}")
    inside = Settings(home=arriving)
    store = open_store(inside)
    arriving.mkdir(parents=True, mode=0o700)
    brought: list[str] = []
    try:
        _bring_files(store, folder, arriving / "staging", found, brought)
        with snapshot.restored(inside.resolved_database_url, folder / LEDGER[kind]) as versions:
            _require_whole(versions, found)
            for path in arriving.iterdir():
                if path.is_file():
                    fsync(path)
            fsync(arriving)
            if home.is_dir():
                home.rmdir()
            arriving.rename(home)
            fsync(home.parent)
    except BaseException:
        if not arriving.exists():  # the ledger's last word, its commit, failed
            home.rename(arriving)
        for version_id in brought:  # the store may be elsewhere
            store.delete(version_id)
        raise
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def _bring_files(store: VersionStore, folder: Path, staging: Path, found: Backup, brought: list[str]) -> None:
    """Copy every version of the backup into the store, where all its bytes are compared; `brought` are those
    that were not there before. Raises CorruptArtifact, ArtifactsUnavailable."""
    there = {one.version_id for one in store.stored()}
    saved, staged_versions = ArtifactStore(folder / "artifacts"), ArtifactStore(staging)
    for version in found.versions:
        staged = staged_versions.new_folder(version.version_id)
        copy_durably(saved.path(version.version_id), staged)
        if version.version_id not in there:
            brought.append(version.version_id)
        store.add(staged, version.version_id, version.manifest_sha256)
    shutil.rmtree(staging, ignore_errors=True)


def _require_whole(versions: list[VersionFiles], found: Backup) -> None:
    """Every version that the restored ledger names is one whose files came. Raises CorruptArtifact."""
    came = {(version.version_id, version.manifest_sha256) for version in found.versions}
    for version in versions:
        if not version.pruned and (version.version_id, version.manifest_sha256) not in came:
            raise CorruptArtifact(f"The backup's ledger names {version.name}, whose files it does not have.")


def _copy(source: Path, saved: ArtifactStore, version: VersionFiles) -> None:
    arriving = saved.new_folder(version.version_id)
    copy_durably(source, arriving)
    saved.add(arriving, version.version_id, version.manifest_sha256)


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or os.listdir(folder)):
        raise CliError(f"{folder} is not an empty folder")
