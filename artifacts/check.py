"""Compares what the ledger says with what the store holds: the reading half of `ratchet fsck`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from artifacts.version_store import VersionStore
from domain.errors import CorruptArtifact

Kind = Literal["missing", "corrupt", "dangling", "orphan"]


class LedgerVersion(Protocol):
    """A version that has, or had, files."""

    @property
    def version_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def manifest_sha256(self) -> str: ...
    @property
    def pruned(self) -> bool:
        """Whether retention let its files go."""

    @property
    def aliases(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Finding:
    kind: Kind
    """missing or corrupt files of a version; dangling: an alias on a version without good files; orphan:
    files that no version names."""
    version_id: str
    """Or an uploaded file's."""
    version: str | None
    """`assistant@v3`; None for an orphan and an uploaded file."""
    message: str
    repaired: bool = False


def check_versions(store: VersionStore, versions: Sequence[LedgerVersion]) -> Iterator[Finding]:
    """Reads every byte of every version. Raises ArtifactsUnavailable."""
    for version in versions:
        problem = _problem(store, version)
        if problem is not None:
            yield problem
        if problem is not None or version.pruned:
            for alias in version.aliases:
                message = f"'{alias}' points at {version.name}, which has no good files"
                yield Finding("dangling", version.version_id, version.name, message)


def orphan(version_id: str) -> Finding:
    return Finding("orphan", version_id, None, f"{version_id}: no version names these files")


def _problem(store: VersionStore, version: LedgerVersion) -> Finding | None:
    if version.pruned:
        return None
    try:
        store.check(version.version_id, version.manifest_sha256)
    except CorruptArtifact as error:
        kind: Kind = "missing" if error.code == "missing_artifact" else "corrupt"
        return Finding(kind, version.version_id, version.name, f"{version.name}: {error.message}")
    return None
