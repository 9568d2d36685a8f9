"""What a version's folder may hold, its manifest, and the comparison of one with the other."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from pydantic import ValidationError

from domain.errors import CorruptArtifact
from domain.version import Manifest, ManifestFile

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.json.partial"
ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".md"})
"""Weights are safetensors and the rest is text: nothing here can execute when it is loaded."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
CHUNK = 1 << 20
"""Bytes read at a time."""
_VERSION_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")


def describe(folder: Path, origin: Manifest, *, durable: bool) -> Manifest:
    """`origin` with what is in `folder`; `durable` also forces files and folders to the disk."""
    entries = regular_files(folder)
    for path in entries:
        if path.suffix not in ALLOWED_SUFFIXES:
            name = path.relative_to(folder).as_posix()
            raise CorruptArtifact(f"'{name}' may not be published: weights must be safetensors.", param=name)
        if path.suffix == ".safetensors":
            check_safetensors(path, path.relative_to(folder).as_posix())
    if not any(path.suffix == ".safetensors" for path in entries):
        raise CorruptArtifact(f"There are no weights (.safetensors) in '{folder}'.")
    files = [
        ManifestFile(
            path=path.relative_to(folder).as_posix(),
            size=path.stat().st_size,
            sha256=sha256_of(path, durable),
        )
        for path in entries
    ]
    if durable:
        for parent in sorted({parent for path in entries for parent in _folders_up_to(folder, path)}):
            fsync(parent)
    return origin.model_copy(update={"files": files})


def compare(folder: Path, manifest: Manifest) -> None:
    """Every byte of `folder` against its manifest. Raises CorruptArtifact naming the file that differs, is
    missing, or does not belong."""
    found = {path.relative_to(folder).as_posix(): path for path in regular_files(folder)}
    expected = {file.path: file for file in manifest.files}
    for name in sorted(found.keys() ^ expected.keys()):
        state = "is missing" if name in expected else "does not belong to the version"
        raise CorruptArtifact(f"{folder.name}: {name} {state}.", param=name)
    for name, file in expected.items():
        size = found[name].stat().st_size
        if size != file.size:
            raise CorruptArtifact(f"{folder.name}: {name} has {size} bytes, not {file.size}.", param=name)
        if sha256_of(found[name], durable=False) != file.sha256:
            raise CorruptArtifact(f"{folder.name}: {name} differs from its sha256.", param=name)


def regular_files(folder: Path) -> list[Path]:
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


def check_safetensors(path: Path, name: str) -> None:
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


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The folder's manifest and the sha256 of its file.

    Raises CorruptArtifact, with code="missing_artifact" when there is no such folder.
    """
    path = folder / MANIFEST
    if not os.path.lexists(folder):
        raise missing(folder.name)
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise CorruptArtifact(f"{folder.name}: {MANIFEST} is missing.", param=MANIFEST)
    return parse_manifest(path.read_bytes(), folder.name)


def parse_manifest(content: bytes, version_id: str) -> tuple[Manifest, str]:
    """The manifest and the sha256 of its bytes. Raises CorruptArtifact."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CorruptArtifact(f"{version_id}: {MANIFEST} is not a manifest.", param=MANIFEST) from error
    return manifest, hashlib.sha256(content).hexdigest()


def require_manifest(version_id: str, found_sha256: str, wanted_sha256: str) -> None:
    """Raises CorruptArtifact unless the manifest is the one that was published."""
    if found_sha256 != wanted_sha256:
        raise CorruptArtifact(f"{version_id}: {MANIFEST} is not the one that was published.", param=MANIFEST)


def require_version_id(version_id: str) -> str:
    """Raises CorruptArtifact for an id that is no file name."""
    if not _VERSION_ID.fullmatch(version_id):
        raise CorruptArtifact(f"'{version_id}' cannot name a version's folder.")
    return version_id


def is_version_id(name: str) -> bool:
    return _VERSION_ID.fullmatch(name) is not None


def missing(version_id: str) -> CorruptArtifact:
    return CorruptArtifact(f"{version_id}: its files are gone.", code="missing_artifact")


def serialise(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def write_manifest(folder: Path, content: bytes) -> None:
    with (folder / PARTIAL_MANIFEST).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (folder / PARTIAL_MANIFEST).replace(folder / MANIFEST)
    fsync(folder)


def sha256_of(path: Path, durable: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        if durable:
            os.fsync(file.fileno())
    return digest.hexdigest()


def copy_durably(source: Path, target: Path) -> None:
    """Copy a folder into `target`, which may exist, and force all of it to the disk."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for path in [*target.rglob("*"), target]:
        fsync(path)


def _folders_up_to(top: Path, path: Path) -> list[Path]:
    return [parent for parent in path.parents if parent == top or top in parent.parents]


def fsync(path: Path) -> None:
    """Force a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
