"""Version files: staged by their maker, then hashed, described by a manifest and moved into place whole.

A version's folder appears under the root by one rename, after its manifest, after its files; whoever sees
the folder sees all of it. It never changes again.
"""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

from pydantic import ValidationError

from domain.errors import Conflict, CorruptArtifact
from domain.version import Manifest, ManifestFile, VersionKind

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.json.partial"
ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".md"})
"""Weights are safetensors and the rest is text: nothing here can execute when it is loaded."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
_VERSION_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
_CHUNK = 1 << 20


class ArtifactStore:
    """Folders of published versions under `root`, which must share a file system with what is staged."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, version_id: str) -> Path:
        """Where the version's files are or will be. Raises CorruptArtifact for an id that is no file name."""
        if not _VERSION_ID.fullmatch(version_id):
            raise CorruptArtifact(f"'{version_id}' cannot name a version's folder.")
        return self.root / version_id

    def publish(
        self, staging: Path, *, version_id: str, kind: VersionKind, base_model: str, update_id: str
    ) -> tuple[Manifest, str]:
        """Move `staging` into place as the version; returns its manifest and the sha256 of the manifest file.

        May be run again after a crash at any point, with `staging` still there or already moved: an
        identical version that stands in place is verified and returned.
        Raises CorruptArtifact naming a file that may not be published, Conflict(code="artifact_exists")
        when another content stands under this id.
        """
        target = self.path(version_id)
        if os.path.lexists(target):
            return self._published(target, staging, kind, base_model, update_id)
        if not staging.is_dir() or staging.is_symlink():
            raise CorruptArtifact(f"There is nothing to publish at '{staging}'.")
        (staging / PARTIAL_MANIFEST).unlink(missing_ok=True)
        manifest = _describe(staging, kind, base_model, update_id, durable=True)
        content = _serialise(manifest)
        _write_manifest(staging, content)
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return self._published(target, staging, kind, base_model, update_id)
        _fsync(self.root)
        _fsync(staging.parent)
        return manifest, hashlib.sha256(content).hexdigest()

    def verify(self, version_id: str, manifest_sha256: str) -> Path:
        """The version's folder, after every byte in it was compared with its manifest.

        Raises CorruptArtifact naming the file that differs, is missing, or does not belong.
        """
        folder = self.path(version_id)
        manifest, found_sha256 = _read_manifest(folder)
        if found_sha256 != manifest_sha256:
            raise CorruptArtifact(
                f"{version_id}: {MANIFEST} is not the one that was published.", param=MANIFEST
            )
        _compare(folder, manifest)
        return folder

    def _published(
        self, target: Path, staging: Path, kind: VersionKind, base_model: str, update_id: str
    ) -> tuple[Manifest, str]:
        manifest, manifest_sha256 = _read_manifest(target)
        same = (manifest.kind, manifest.base_model, manifest.update_id) == (kind, base_model, update_id)
        if same and staging.is_dir():
            same = _describe(staging, kind, base_model, update_id, durable=False) == manifest
        if not same:
            raise Conflict(f"Other files are already published as '{target.name}'.", code="artifact_exists")
        _compare(target, manifest)
        # The rename may have been seen by this process and still be lost with the power.
        _fsync(self.root)
        return manifest, manifest_sha256


def _describe(folder: Path, kind: VersionKind, base_model: str, update_id: str, *, durable: bool) -> Manifest:
    """The manifest of what is in `folder`; `durable` also forces files and folders to the disk."""
    entries = _files(folder)
    for path in entries:
        if path.suffix not in ALLOWED_SUFFIXES:
            name = path.relative_to(folder).as_posix()
            raise CorruptArtifact(f"'{name}' may not be published: weights must be safetensors.", param=name)
        if path.suffix == ".safetensors":
            _check_safetensors(path, path.relative_to(folder).as_posix())
    if not any(path.suffix == ".safetensors" for path in entries):
        raise CorruptArtifact(f"There are no weights (.safetensors) in '{folder}'.")
    files = [
        ManifestFile(
            path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=_sha256(path, durable)
        )
        for path in entries
    ]
    if durable:
        for parent in sorted({parent for path in entries for parent in _folders_up_to(folder, path)}):
            _fsync(parent)
    return Manifest(kind=kind, base_model=base_model, update_id=update_id, files=files)


def _compare(folder: Path, manifest: Manifest) -> None:
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    expected = {file.path: file for file in manifest.files}
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "does not belong to the version"
        raise CorruptArtifact(f"{folder.name}: {name} {state}.", param=name)
    for name, file in expected.items():
        size = found[name].stat().st_size
        if size != file.size:
            raise CorruptArtifact(f"{folder.name}: {name} has {size} bytes, not {file.size}.", param=name)
        if _sha256(found[name], durable=False) != file.sha256:
            raise CorruptArtifact(f"{folder.name}: {name} differs from its sha256.", param=name)


def _files(folder: Path) -> list[Path]:
    """Regular files below `folder`, sorted, but for its manifest. Raises CorruptArtifact for links."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            regular = path.is_dir() if name in folders else path.is_file()
            if path.is_symlink() or not regular:
                shown = path.relative_to(folder).as_posix()
                raise CorruptArtifact(f"{folder.name}: {shown} is not a regular file.", param=shown)
        found.extend(Path(parent, name) for name in names)
    return sorted(path for path in found if path != folder / MANIFEST)


def _check_safetensors(path: Path, name: str) -> None:
    """The header must describe exactly the bytes that follow: no pickle in disguise, nothing cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CorruptArtifact(f"'{name}' is not a safetensors file.", param=name)
        try:
            header = json.loads(file.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise CorruptArtifact(f"'{name}' is not a safetensors file.", param=name) from error
    if end != size - 8 - length:
        raise CorruptArtifact(f"'{name}' is cut off or has trailing bytes.", param=name)


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise CorruptArtifact(f"{folder.name}: {MANIFEST} is missing.", param=MANIFEST)
    content = path.read_bytes()
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CorruptArtifact(f"{folder.name}: {MANIFEST} is not a manifest.", param=MANIFEST) from error
    return manifest, hashlib.sha256(content).hexdigest()


def _serialise(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def _write_manifest(folder: Path, content: bytes) -> None:
    with (folder / PARTIAL_MANIFEST).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (folder / PARTIAL_MANIFEST).replace(folder / MANIFEST)
    _fsync(folder)


def _sha256(path: Path, durable: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if durable:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _folders_up_to(top: Path, path: Path) -> list[Path]:
    return [parent for parent in path.parents if parent == top or top in parent.parents]


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
