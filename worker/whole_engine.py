"""An engine of its own for a whole model, for as long as an evaluation needs it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from domain.errors import EngineUnavailable, StaleFence
from registry import engines, serving
from registry.claims import Claim
from worker.journal import Journal
from worker.lease import Lease

logger = logging.getLogger(__name__)

START_SECONDS = 900.0
"""A large model takes minutes to load, and before it others may have to end."""
POLL_SECONDS = 0.5


@contextmanager
def engine_for(
    sessions: sessionmaker[Session],
    reads: sessionmaker[Session],
    claim: Claim,
    model_id: str,
    folder: Path | None,
    *,
    lease: Lease,
    journal: Journal,
) -> Iterator[None]:
    """A full version, or with `folder` this update's candidate, has an engine inside the block.

    Whoever supervises engines starts it (registry/engines.py); should this worker die, the demand ends with
    its lease. Raises EngineUnavailable after START_SECONDS, Interrupted, StaleFence.
    """
    with sessions.begin() as session:
        engines.demand_for_update(session, claim, model_id, None if folder is None else str(folder))
    try:
        _await_start(reads, model_id, lease, journal)
        yield
    finally:
        try:
            with sessions.begin() as session:
                engines.withdraw(session, claim, model_id)
        except StaleFence:
            logger.info("the engine of %s is the successor's to withdraw", model_id)


def _await_start(reads: sessionmaker[Session], model_id: str, lease: Lease, journal: Journal) -> None:
    began, told = time.monotonic(), None
    while True:
        lease.check()
        with reads() as session:
            running = any(replica.base_model == model_id for replica in serving.replicas(session))
            problem = engines.problem(session, model_id)
        if running:
            return
        waited = time.monotonic() - began
        if waited > START_SECONDS:
            reason = problem or "nobody started one"
            raise EngineUnavailable(f"No inference engine after {waited:.0f} s: {reason}")
        if problem is not None and problem != told:
            told = problem
            journal.tell(f"Waiting for an inference engine: {problem}", level="warning")
        time.sleep(POLL_SECONDS)
