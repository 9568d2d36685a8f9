"""A worker's claim on an update: proof, by its fence, that no later worker has taken over."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.errors import StaleFence
from domain.update import Status
from registry.tables import Update


@dataclass(frozen=True)
class Claim:
    update_id: str
    fence: int
    team_id: str
    assistant_id: str


@dataclass(frozen=True)
class Patience:
    """How often and when an update is tried again that gets no further.

    A setback is a worker that was lost with the update, or a failure that may pass by itself.
    """

    tries: int = 6
    first_seconds: float = 30.0
    most_seconds: float = 600.0

    def seconds(self, setbacks: int) -> float:
        """To wait after that many setbacks in a row: doubling from the first."""
        return min(self.first_seconds * 2.0 ** (setbacks - 1), self.most_seconds) if setbacks else 0.0


@dataclass(frozen=True)
class Signals:
    """What people asked of a running update since its last heartbeat."""

    cancel: bool
    pause: bool


def locked(session: Session, update_id: str) -> Update:
    """The update as it is now, locked to the end of the transaction."""
    return session.scalars(
        select(Update)
        .where(Update.id == update_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()


def held(session: Session, claim: Claim) -> Update:
    """The claimed update, locked. Raises StaleFence when another worker holds it or it has ended.

    A lease that has run out without a successor still holds: the fence decides, not the clock.
    """
    update = locked(session, claim.update_id)
    if update.fence != claim.fence or update.status != Status.RUNNING:
        raise StaleFence(
            f"Fence {claim.fence} of update {claim.update_id} is no longer current "
            f"(fence {update.fence}, {update.status})."
        )
    return update
