"""What sweeping, checking and copying versions need of a store, whatever it keeps its files in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from domain.version import Checkpoint, Manifest, VersionKind


@dataclass(frozen=True)
class StoredVersion:
    """Files that a store holds under one id."""

    version_id: str
    whole: bool
    """Whether there is a manifest: without one, nobody can see the files as a version."""
    modified_at: float
    """Unix seconds, by the store's clock."""


class VersionStore(Protocol):
    """Immutable versions by id. Every method may raise ArtifactsUnavailable when the store is elsewhere."""

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
        """Take over the files in `staging` as the version: all visible together, or nothing. Idempotent.
        `checkpoint` is what an adapter lies on, where that is not the base model itself.

        Returns the manifest and the sha256 of its bytes. Raises CorruptArtifact, Conflict.
        """

    def add(self, folder: Path, version_id: str, manifest_sha256: str) -> object:
        """Take over a `folder` that already has its manifest. Idempotent. Raises CorruptArtifact."""

    def verify(self, version_id: str, manifest_sha256: str) -> Path:
        """A local folder with the version's files, every byte compared; sure to stay only within `held`.
        Raises CorruptArtifact."""

    def held(self, version_id: str) -> AbstractContextManager[None]:
        """While the block runs, the folder that `verify` gives or gave makes no room for other versions."""

    def check(self, version_id: str, manifest_sha256: str) -> None:
        """Compare every byte that is stored, without keeping a local copy. Raises CorruptArtifact."""

    def stored(self) -> Iterator[StoredVersion]: ...

    def delete(self, version_id: str) -> None:
        """Invisible first, then gone. Nothing there is fine."""

    def remove_temporary(self, older_than_seconds: float) -> list[str]:
        """What crashes left that no id leads to; returns names."""
