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
    @property
    def checkpoint_id(self) -> str | None:
        """The full version that it is or lies on; None where that is the base model itself."""


@dataclass(frozen=True)
class Finding:
    kind: Kind
    """missing or corrupt files of a version; dangling: an alias on a version without good files, or on one
    that lies on such a one; orphan: files that no version names."""
    version_id: str
    """Or an uploaded file's."""
    version: str | None
    """`assistant@v3`; None for an orphan and an uploaded file."""
    message: str
    repaired: bool = False


def check_versions(store: VersionStore, versions: Sequence[LedgerVersion]) -> Iterator[Finding]:
    """Reads every byte of every version; in `versions` what one lies on comes before it. Raises
    ArtifactsUnavailable."""
    unusable: dict[str, LedgerVersion] = {}
    for version in versions:
        problem = _problem(store, version)
        below = unusable.get(version.checkpoint_id or "")
        if problem is None and below is not None and below.pruned and not version.pruned:
            message = f"{version.name}: {below.name}, on which it lies, was let go"
            problem = Finding("missing", version.version_id, version.name, message)
        if problem is not None:
            yield problem
        if problem is None and below is None and not version.pruned:
            continue
        unusable[version.version_id] = version
        for alias in version.aliases:
            fault = "which has no good files"
            if problem is None and below is not None:
                fault = f"which lies on {below.name}, which has no good files"
            message = f"'{alias}' points at {version.name}, {fault}"
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
