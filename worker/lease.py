"""The claim on an update kept alive by a heartbeat, and the reasons to stop working on it."""

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from domain.errors import StaleFence
from registry.updates import Claim, heartbeat

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 2.0
"""After a heartbeat that failed: an outage that nearly fills a lease shall not lose it."""


class Stop(StrEnum):
    """Why the work must stop, most urgent first."""

    LOST = "lost"
    """The lease ran out or another worker holds it: write nothing more."""
    CANCEL = "cancel"
    SHUTDOWN = "shutdown"
    PAUSE = "pause"


class Interrupted(Exception):
    """Raised out of a stage that was asked to stop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.value)
        self.stop = stop


class Lease:
    """Renews one claim from a thread of its own.

    Entering beats once in the caller's thread and raises StaleFence when the claim is already lost.
    """

    def __init__(
        self,
        sessions: sessionmaker[Session],
        claim: Claim,
        *,
        lease_seconds: float,
        heartbeat_seconds: float,
        shutdown_requested: Callable[[], bool],
    ) -> None:
        self._sessions = sessions
        self._claim = claim
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._shutdown_requested = shutdown_requested
        self._cancel = False
        self._pause = False
        self._fenced_out = False
        self._good_until = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def stop(self) -> Stop | None:
        """The most urgent reason to stop, if any."""
        if self._fenced_out or time.monotonic() > self._good_until:
            return Stop.LOST
        if self._cancel:
            return Stop.CANCEL
        if self._shutdown_requested():
            return Stop.SHUTDOWN
        return Stop.PAUSE if self._pause else None

    def check(self) -> None:
        """Raises Interrupted when there is a reason to stop."""
        stop = self.stop()
        if stop is not None:
            raise Interrupted(stop)

    def _beat(self) -> None:
        # Counted from before the call: the database's lease began no earlier than this.
        asked = time.monotonic()
        with self._sessions.begin() as session:
            signals = heartbeat(session, self._claim, self._lease_seconds)
        self._good_until = asked + self._lease_seconds
        self._cancel, self._pause = signals.cancel, signals.pause

    def _renew(self) -> None:
        pause = self._heartbeat_seconds
        while not self._ended.wait(pause):
            pause = self._heartbeat_seconds
            try:
                self._beat()
            except StaleFence:
                self._fenced_out = True
                return
            except SQLAlchemyError as error:
                # Busy or away: stop() says LOST by the clock if it stays so for a whole lease.
                logger.warning("heartbeat of %s failed: %s", self._claim.update_id, error)
                pause = min(AGAIN_SECONDS, pause)
