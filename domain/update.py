"""States of an update and the one transition table."""

from enum import StrEnum
from typing import Literal

from domain.errors import Conflict


class Status(StrEnum):
    """OpenAI's job states."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    """Ran to a verdict; the verdict says whether its version serves."""
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """Where a running update stands in the story."""

    PREFLIGHT = "preflight"
    TRAINING = "training"
    EVALUATING = "evaluating"
    GATING = "gating"
    PUBLISHING = "publishing"
    SERVING = "serving"


Publish = Literal["auto", "hold"]

TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.CANCELLED}),
    Status.RUNNING: frozenset(
        {Status.RUNNING, Status.QUEUED, Status.PAUSED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}
    ),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""RUNNING -> RUNNING is a take-over after a lost lease; RUNNING -> QUEUED a lease given back."""

FINISHED = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})


def require_transition(current: Status, wanted: Status) -> None:
    """Raise Conflict unless `wanted` may follow `current`."""
    if wanted not in TRANSITIONS[current]:
        raise Conflict(f"The update is {current.value} and cannot become {wanted.value}.", param="status")
