"""Version files in an object store (S3, and what speaks its protocol).

Keys are `<version id>/<sha256 of a file>` and `<version id>/manifest.json`. The manifest is written last,
once, and only after every object was read back: a version without one is visible to nobody. Files are named
by their content, so that no writer can change what another one's manifest names.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from artifacts.cache import VersionCache
from artifacts.files import (
    CHUNK,
    MANIFEST,
    PARTIAL_MANIFEST,
    compare,
    describe,
    fsync,
    missing,
    parse_manifest,
    read_manifest,
    require_manifest,
    require_version_id,
    serialise,
    write_manifest,
)
from artifacts.version_store import StoredVersion
from domain.errors import ArtifactsUnavailable, Conflict, CorruptArtifact, InvalidInput
from domain.version import Checkpoint, Manifest, ManifestFile, VersionKind

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = timedelta(seconds=5)
READ_TIMEOUT = timedelta(seconds=20)
"""Between two pieces of a reply."""
LONGEST_TRANSFER = timedelta(hours=1)
"""Of one file; the library's 30 s would cut off a large model."""
PATIENCE = timedelta(seconds=60)
"""How long a failing request is tried again before the store counts as unavailable."""


class ObjectStore:
    """Versions below `url` (s3://bucket/prefix), fetched to `cache` for whoever needs files.

    Credentials, region and endpoint come from the provider's own environment variables (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, ...). Raises InvalidInput for a URL that names no bucket.
    """

    def __init__(self, url: str, cache: VersionCache) -> None:
        try:
            self._bucket = S3Store.from_url(
                url,
                client_options={
                    "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"),
                    "connect_timeout": CONNECT_TIMEOUT,
                    "read_timeout": READ_TIMEOUT,
                    "timeout": LONGEST_TRANSFER,
                },
                retry_config={"retry_timeout": PATIENCE},
            )
        except (BaseError, ValueError) as error:
            raise InvalidInput(f"'{url}' names no bucket: {error}", param="RATCHET_ARTIFACTS_URL") from error
        self.url = url
        self.cache = cache

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
        """Upload `staging` as the version and remove it; returns the manifest and the sha256 of its bytes.

        May be run again after a crash at any point. Raises CorruptArtifact naming a file that may not be
        published or did not arrive whole, Conflict(code="artifact_exists"), ArtifactsUnavailable.
        """
        require_version_id(version_id)
        origin = Manifest(
            kind=kind, base_model=base_model, update_id=update_id, checkpoint=checkpoint, files=[]
        )
        if self._manifest(version_id) is None:
            if not staging.is_dir() or staging.is_symlink():
                raise CorruptArtifact(f"There is nothing to publish at '{staging}'.")
            (staging / PARTIAL_MANIFEST).unlink(missing_ok=True)
            manifest = describe(staging, origin, durable=False)
            self._upload(staging, version_id, manifest)
            self._show(version_id, serialise(manifest))
        published = self._published(version_id, staging, origin)
        shutil.rmtree(staging, ignore_errors=True)
        return published

    def add(self, folder: Path, version_id: str, manifest_sha256: str) -> None:
        """Upload a `folder` that already has its manifest. Raises CorruptArtifact, ArtifactsUnavailable."""
        require_version_id(version_id)
        if self._manifest(version_id) is None:
            manifest, found_sha256 = read_manifest(folder)
            require_manifest(version_id, found_sha256, manifest_sha256)
            compare(folder, manifest)
            self._upload(folder, version_id, manifest)
            self._show(version_id, (folder / MANIFEST).read_bytes())
        self.check(version_id, manifest_sha256)

    def verify(self, version_id: str, manifest_sha256: str) -> Path:
        """The version's folder in the cache, every byte compared with the manifest.

        A damaged copy is thrown away and fetched again, and others make room for a new one. Raises
        CorruptArtifact when what is stored is damaged (code="missing_artifact" when it is gone),
        ArtifactsUnavailable.
        """
        with self.held(version_id):
            try:
                return self.cache.verify(version_id, manifest_sha256)
            except CorruptArtifact as error:
                if error.code != "missing_artifact":
                    logger.warning("the local copy is damaged, fetching again: %s", error.message)
                    self.cache.delete(version_id)
            arriving = self.cache.new_folder(version_id)
            try:
                self._fetch(version_id, manifest_sha256, arriving)
                return self.cache.add(arriving, version_id, manifest_sha256)
            finally:
                shutil.rmtree(arriving, ignore_errors=True)

    def held(self, version_id: str) -> AbstractContextManager[None]:
        return self.cache.held(version_id)

    def check(self, version_id: str, manifest_sha256: str) -> None:
        """Read and compare every byte that is stored. Raises CorruptArtifact, ArtifactsUnavailable."""
        manifest, _ = self._required_manifest(version_id, manifest_sha256)
        self._compare(version_id, manifest)

    def stored(self) -> Iterator[StoredVersion]:
        """Every id with objects below it. Raises ArtifactsUnavailable."""
        newest: dict[str, float] = {}
        whole: set[str] = set()
        try:
            for chunk in obstore.list(self._bucket):
                for found in chunk:
                    version_id, _, name = found["path"].partition("/")
                    changed = found["last_modified"].timestamp()
                    newest[version_id] = max(changed, newest.get(version_id, 0.0))
                    if name == MANIFEST:
                        whole.add(version_id)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        for version_id in sorted(newest):
            yield StoredVersion(version_id, version_id in whole, newest[version_id])

    def delete(self, version_id: str) -> None:
        """The manifest first, so that nobody sees half a version; then the rest, here and in the cache."""
        require_version_id(version_id)
        try:
            obstore.delete(self._bucket, _manifest_key(version_id))
        except FileNotFoundError:  # some stores mind, S3 does not
            pass
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        try:
            for chunk in obstore.list(self._bucket, version_id):
                obstore.delete(self._bucket, [found["path"] for found in chunk])
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        self.cache.delete(version_id)

    def remove_temporary(self, older_than_seconds: float) -> list[str]:
        """Only the cache has some: an interrupted upload has an id, and its parts are the bucket's lifecycle
        rule's business. The cache comes to fit its bound again, should more have been in use at its last
        fetch."""
        self.cache.make_room(0)
        return self.cache.remove_temporary(older_than_seconds)

    def _upload(self, folder: Path, version_id: str, manifest: Manifest) -> None:
        """Every file, in any order, read back before anybody may rely on it."""
        for digest, file in _by_digest(manifest).items():
            try:
                obstore.put(self._bucket, f"{version_id}/{digest}", folder / file.path)
            except (BaseError, OSError) as error:
                raise self._unavailable(error) from error
        self._compare(version_id, manifest)

    def _show(self, version_id: str, content: bytes) -> None:
        """Make the version visible, unless somebody else just did."""
        try:
            obstore.put(self._bucket, _manifest_key(version_id), content, mode="create")
        except AlreadyExistsError:
            logger.info("%s was published by somebody else meanwhile", version_id)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def _published(self, version_id: str, staging: Path, origin: Manifest) -> tuple[Manifest, str]:
        found = self._manifest(version_id)
        if found is None:
            raise missing(version_id)
        manifest, manifest_sha256 = parse_manifest(found, version_id)
        same = manifest.model_copy(update={"files": []}) == origin
        if same and staging.is_dir():
            same = describe(staging, origin, durable=False) == manifest
        if not same:
            raise Conflict(f"Other files are already published as '{version_id}'.", code="artifact_exists")
        self._compare(version_id, manifest)
        return manifest, manifest_sha256

    def _fetch(self, version_id: str, manifest_sha256: str, folder: Path) -> None:
        manifest, content = self._required_manifest(version_id, manifest_sha256)
        self.cache.make_room(sum(file.size for file in manifest.files))
        for file in manifest.files:
            target = folder / file.path
            if not target.resolve().is_relative_to(folder.resolve()):
                raise CorruptArtifact(f"{version_id}: {file.path} leads out of its folder.", param=file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as local:
                for chunk in self._read(version_id, file):
                    local.write(chunk)
        for path in folder.rglob("*"):
            fsync(path)
        write_manifest(folder, content)

    def _compare(self, version_id: str, manifest: Manifest) -> None:
        for file in _by_digest(manifest).values():
            for _ in self._read(version_id, file):
                pass

    def _read(self, version_id: str, file: ManifestFile) -> Iterator[bytes]:
        """The file's bytes; raises CorruptArtifact after the last one unless they are the published ones."""
        digest, size = hashlib.sha256(), 0
        try:
            for part in obstore.get(self._bucket, f"{version_id}/{file.sha256}").stream(min_chunk_size=CHUNK):
                chunk = bytes(part)
                digest.update(chunk)
                size += len(chunk)
                yield chunk
        except FileNotFoundError as error:
            raise CorruptArtifact(f"{version_id}: {file.path} is missing.", param=file.path) from error
        except BaseError as error:
            raise self._unavailable(error) from error
        if size != file.size:
            raise CorruptArtifact(
                f"{version_id}: {file.path} has {size} bytes, not {file.size}.", param=file.path
            )
        if digest.hexdigest() != file.sha256:
            raise CorruptArtifact(f"{version_id}: {file.path} differs from its sha256.", param=file.path)

    def _required_manifest(self, version_id: str, manifest_sha256: str) -> tuple[Manifest, bytes]:
        content = self._manifest(require_version_id(version_id))
        if content is None:
            raise missing(version_id)
        manifest, found_sha256 = parse_manifest(content, version_id)
        require_manifest(version_id, found_sha256, manifest_sha256)
        return manifest, content

    def _manifest(self, version_id: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._bucket, _manifest_key(version_id)).bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ArtifactsUnavailable:
        first_line = str(error).partition("\n")[0]
        return ArtifactsUnavailable(f"The object store at {self.url} does not answer: {first_line}")


def _manifest_key(version_id: str) -> str:
    return f"{version_id}/{MANIFEST}"


def _by_digest(manifest: Manifest) -> dict[str, ManifestFile]:
    """Files of the same content are stored once."""
    return {file.sha256: file for file in manifest.files}
