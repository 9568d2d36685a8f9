"""Removes what a store need not keep: versions that retention lets go, orphans, remains of crashes."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from artifacts.version_store import VersionStore

logger = logging.getLogger(__name__)


class Ledger(Protocol):
    """What decides; each method is a transaction of its own."""

    def prunable(self) -> Sequence[str]:
        """Ids of versions that the policy lets go."""

    def prune(self, version_id: str) -> bool:
        """Mark it as no longer kept; false when something came to need it."""

    def unneeded(self, stored: Sequence[str]) -> Sequence[str]:
        """Those of the stored ids that no version has and no update can still publish."""


@dataclass(frozen=True)
class Swept:
    pruned: list[str]
    """Versions whose files retention let go."""
    orphans: list[str]
    """Ids whose files no version named."""
    temporary: list[str]


def sweep(store: VersionStore, ledger: Ledger, *, grace_seconds: float) -> Swept:
    """One round. May run anywhere, several at a time, and be killed at any point: the next one goes on."""
    pruned = []
    for version_id in ledger.prunable():
        if ledger.prune(version_id):
            store.delete(version_id)
            pruned.append(version_id)
    orphans = orphaned(store, ledger.unneeded, grace_seconds)
    for version_id in orphans:
        store.delete(version_id)
    done = Swept(pruned, orphans, store.remove_temporary(grace_seconds))
    if done.pruned or done.orphans or done.temporary:
        logger.info("removed %s", done)
    return done


def orphaned(
    store: VersionStore, unneeded: Callable[[Sequence[str]], Sequence[str]], grace_seconds: float
) -> list[str]:
    """Ids whose files are older than the grace and needed by nobody, as `Ledger.unneeded` says."""
    newest = time.time() - grace_seconds
    # Listed before the ledger is asked: what nobody needs then, nobody can come to need.
    old = [one.version_id for one in store.stored() if one.modified_at < newest]
    return list(unneeded(old))
