"""Version files in folders: staged by their maker, hashed, given a manifest and moved into place whole.

A version's folder appears under the root by one rename, after its manifest, after its files; whoever sees
the folder sees all of it. It never changes again.
"""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from artifacts.files import (
    MANIFEST,
    PARTIAL_MANIFEST,
    compare,
    copy_durably,
    describe,
    fsync,
    is_version_id,
    read_manifest,
    require_manifest,
    require_version_id,
    serialise,
    write_manifest,
)
from artifacts.version_store import StoredVersion
from domain.errors import Conflict, CorruptArtifact
from domain.version import Checkpoint, Manifest, VersionKind

_ARRIVING = ".arriving-"
_LEAVING = ".leaving-"
"""Beginnings of names that no version has: folders on their way in from elsewhere, and on their way out."""


class ArtifactStore:
    """Folders of published versions under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, version_id: str) -> Path:
        """Where the version's files are or will be. Raises CorruptArtifact for an id that is no file name."""
        return self.root / require_version_id(version_id)

    def publish(
        self,
        staging: Path,
        *,
        version_id: str,
        kind: VersionKind,
        base_model: str,
        update_id: str,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Manifest, str]:
        """Move `staging` into place as the version; returns its manifest and the sha256 of the manifest file.

        May be run again after a crash at any point, with `staging` still there or already moved: an
        identical version that stands in place is verified and returned.
        Raises CorruptArtifact naming a file that may not be published, Conflict(code="artifact_exists")
        when another content stands under this id.
        """
        target = self.path(version_id)
        origin = Manifest(
            kind=kind, base_model=base_model, update_id=update_id, checkpoint=checkpoint, files=[]
        )
        if os.path.lexists(target):
            return self._published(target, staging, origin)
        if not staging.is_dir() or staging.is_symlink():
            raise CorruptArtifact(f"There is nothing to publish at '{staging}'.")
        (staging / PARTIAL_MANIFEST).unlink(missing_ok=True)
        manifest = describe(staging, origin, durable=True)
        content = serialise(manifest)
        write_manifest(staging, content)
        if not self._move(staging, target):
            return self._published(target, staging, origin)
        return manifest, hashlib.sha256(content).hexdigest()

    def add(self, folder: Path, version_id: str, manifest_sha256: str) -> Path:
        """Move a `folder` that already has its manifest into place, every byte compared first.

        Does nothing when the same version stands there. Raises CorruptArtifact for either of them.
        """
        target = self.path(version_id)
        if not os.path.lexists(target):
            manifest, found_sha256 = read_manifest(folder)
            require_manifest(version_id, found_sha256, manifest_sha256)
            compare(folder, manifest)
            self._move(folder, target)
        return self.verify(version_id, manifest_sha256)

    def verify(self, version_id: str, manifest_sha256: str) -> Path:
        """The version's folder, after every byte in it was compared with its manifest.

        Raises CorruptArtifact naming the file that differs, is missing, or does not belong;
        code="missing_artifact" when the whole folder is gone.
        """
        folder = self.path(version_id)
        manifest, found_sha256 = read_manifest(folder)
        require_manifest(version_id, found_sha256, manifest_sha256)
        compare(folder, manifest)
        return folder

    def held(self, version_id: str) -> AbstractContextManager[None]:
        """Nothing to do: these folders are the versions themselves."""
        return nullcontext()

    def check(self, version_id: str, manifest_sha256: str) -> None:
        """As `verify`, for whoever needs no files."""
        self.verify(version_id, manifest_sha256)

    def stored(self) -> Iterator[StoredVersion]:
        """What stands under the root, published or not known to anybody."""
        if not self.root.is_dir():
            return
        for entry in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if is_version_id(entry.name) and entry.is_dir(follow_symlinks=False):
                whole = Path(entry.path, MANIFEST).is_file()
                try:
                    changed = entry.stat(follow_symlinks=False).st_mtime
                except FileNotFoundError:  # deleted since the folder was read
                    continue
                yield StoredVersion(entry.name, whole, changed)

    def delete(self, version_id: str) -> None:
        """Remove the version's files: gone for readers at once, then from the disk. Nothing there is fine."""
        target = self.path(version_id)
        leaving = self.root / f"{_LEAVING}{version_id}-{secrets.token_hex(4)}"
        try:
            target.rename(leaving)
        except FileNotFoundError:
            return
        fsync(self.root)
        try:
            shutil.rmtree(leaving)
        except FileNotFoundError:  # a sweep is at it too
            shutil.rmtree(leaving, ignore_errors=True)

    def remove_temporary(self, older_than_seconds: float) -> list[str]:
        """Folders that a crash left on their way in (when older) or out (of any age); returns their names."""
        removed = []
        newest = time.time() - older_than_seconds
        for path in sorted(self.root.glob(".*")):
            try:
                stale = path.name.startswith(_ARRIVING) and path.stat().st_mtime < newest
            except FileNotFoundError:  # it arrived
                continue
            if stale or path.name.startswith(_LEAVING):
                shutil.rmtree(path, ignore_errors=True)  # another sweep may be at it too
                removed.append(path.name)
        return removed

    def new_folder(self, version_id: str) -> Path:
        """An empty folder beside the versions, for files on their way to `add`."""
        arriving = self.root / f"{_ARRIVING}{require_version_id(version_id)}-{secrets.token_hex(4)}"
        arriving.mkdir(parents=True)
        return arriving

    def _move(self, folder: Path, target: Path) -> bool:
        """Whether `folder`, its content already on the disk, became `target`; False: something else did."""
        self.root.mkdir(parents=True, exist_ok=True)
        parent = folder.parent
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            if error.errno != errno.EXDEV:
                raise
            return self._move_across(folder, target)
        fsync(self.root)
        fsync(parent)
        return True

    def _move_across(self, folder: Path, target: Path) -> bool:
        """`_move` from another file system: copied beside the target, compared, then renamed."""
        arriving = self.new_folder(target.name)
        copy_durably(folder, arriving)
        manifest, _ = read_manifest(arriving)
        compare(arriving, manifest)
        moved = self._move(arriving, target)
        shutil.rmtree(folder if moved else arriving)
        return moved

    def _published(self, target: Path, staging: Path, origin: Manifest) -> tuple[Manifest, str]:
        manifest, manifest_sha256 = read_manifest(target)
        same = manifest.model_copy(update={"files": []}) == origin
        if same and staging.is_dir():
            same = describe(staging, origin, durable=False) == manifest
        if not same:
            raise Conflict(f"Other files are already published as '{target.name}'.", code="artifact_exists")
        compare(target, manifest)
        # The rename may have been seen by this process and still be lost with the power.
        fsync(self.root)
        return manifest, manifest_sha256
