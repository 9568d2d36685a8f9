"""What a claim tells the people who follow its update: phases, events, seconds per stage.

Every entry is a short transaction of its own that carries the claim: it raises StaleFence when another
worker has taken over. While the database is away an entry waits, for as long as there is no reason to stop:
hours of training are not given up for a minute's outage. One whose commit nobody confirmed may stand twice.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from domain.failpoint import failpoint
from domain.measurement import Measurement
from domain.training import (
    CheckpointLine,
    DoneLine,
    FailedLine,
    HoldoutLine,
    PreflightLine,
    RefusedLine,
    StepLine,
    TrainerLine,
    describe,
)
from domain.update import Phase
from registry.claims import Claim
from registry.events import EventType, Level, add_event
from registry.measurements import save_measurement
from registry.session import LedgerError, is_away
from registry.tables import Version
from registry.updates import note_progress, set_phase
from worker.lease import AGAIN_SECONDS, Stop

logger = logging.getLogger(__name__)

PLACES_TOLD = 20
"""Demonstrations named by one finding of preflight: an event is read by people, the counts are complete."""


class Journal:
    def __init__(
        self, sessions: sessionmaker[Session], claim: Claim, stop: Callable[[], Stop | None]
    ) -> None:
        """`stop`: the lease's."""
        self._sessions = sessions
        self._claim = claim
        self._stop = stop
        self._phase: Phase | None = None
        self._began = 0.0
        self._seconds: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        """Does nothing when the story is in this phase already."""
        if phase == self._phase:
            return
        self._write(lambda session: set_phase(session, self._claim, phase))
        self._close()
        self._phase, self._began = phase, time.monotonic()

    def tell(
        self,
        message: str,
        *,
        type: EventType = "message",
        level: Level = "info",
        data: dict[str, Any] | None = None,
        progress: bool = False,
    ) -> None:
        """With `progress`, the update got further than ever before: earlier setbacks count no more."""

        def write(session: Session) -> None:
            add_event(
                session,
                self._claim.update_id,
                type=type,
                message=message,
                level=level,
                data=data,
                claim=self._claim,
            )
            if progress:
                note_progress(session, self._claim)

        self._write(write)

    def hear(self, line: TrainerLine) -> None:
        """One line of the trainer's as an event; its first sign of training opens that phase."""
        match line:
            case PreflightLine():
                self._hear_preflight(line)
            case CheckpointLine(resumed=True):
                self.enter(Phase.TRAINING)
                self._retell(line)
            case StepLine():
                self.enter(Phase.TRAINING)
                self._retell(line, type="metrics")
                failpoint("worker.step_heard")
            case CheckpointLine() | DoneLine():
                self._retell(line, progress=True)
            case HoldoutLine():
                self._retell(line)
            case FailedLine() | RefusedLine():
                pass  # the update's end says it

    def _hear_preflight(self, line: PreflightLine) -> None:
        self._retell(line.with_fewer_places(PLACES_TOLD))
        for finding in line.warnings:
            self.tell(f"{finding.message} {finding.mend}", level="warning")
        if not line.errors:
            self.enter(Phase.TRAINING)

    def _retell(self, line: TrainerLine, type: EventType = "message", *, progress: bool = False) -> None:
        self.tell(describe(line), type=type, data=line.model_dump(mode="json"), progress=progress)

    def measured(self, who: str, version: Version | None, measurement: Measurement, *, new: bool) -> None:
        """`who` is candidate, parent or base. With a version, the measurement is stored as its own; the
        candidate's are stored when it is published. `new`: some of its items were asked just now."""

        def write(session: Session) -> None:
            add_event(
                session,
                self._claim.update_id,
                type="message",
                message=f"{who.capitalize()} on {measurement.suite}: "
                f"{measurement.score:.3f} on {measurement.n} items.",
                data={"of": who, "measurement": measurement.model_dump(mode="json", exclude={"items"})},
                claim=self._claim,
            )
            if version is not None:
                save_measurement(session, version, measurement)
            if new:
                note_progress(session, self._claim)

        self._write(write)

    def stage_seconds(self) -> dict[str, float]:
        """Wall seconds that this claim spent in each phase so far."""
        self._close()
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}

    def _write(self, work: Callable[[Session], None]) -> None:
        while True:
            try:
                with self._sessions.begin() as session:
                    work(session)
                return
            except LedgerError as error:
                if not is_away(error) or self._stop() is not None:
                    raise
                logger.warning("%s: an entry waits for the database: %s", self._claim.update_id, error)
            time.sleep(AGAIN_SECONDS)

    def _close(self) -> None:
        if self._phase is not None:
            now = time.monotonic()
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._began
            self._began = now
