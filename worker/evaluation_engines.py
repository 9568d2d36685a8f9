"""Which engine answers for which of the versions that an evaluation compares."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from domain.errors import EngineUnavailable
from domain.settings import Settings
from registry.claims import Claim
from worker.brief import Brief
from worker.journal import Journal
from worker.lease import Lease
from worker.patient_engine import PatientEngine, PatientModel
from worker.whole_engine import engine_for


class Engines:
    """The base model's engine runs anyway; those of checkpoints run for the length of a block."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        reads: sessionmaker[Session],
        claim: Claim,
        brief: Brief,
        lease: Lease,
        journal: Journal,
        settings: Settings,
    ) -> None:
        self._sessions = sessions
        self._reads = reads
        self._claim = claim
        self._brief = brief
        self._lease = lease
        self._journal = journal
        self._settings = settings

    @contextmanager
    def of_base(self) -> Iterator[PatientEngine]:
        """Of the assistant's base model."""
        with self._engine(self._brief.base_model) as engine:
            yield engine

    @contextmanager
    def of_parent(self) -> Iterator[PatientEngine]:
        """Of the whole model that the parent is or lies on, and an adapter candidate with it."""
        checkpoint = self._brief.checkpoint
        if checkpoint is None:
            with self.of_base() as engine:
                yield engine
            return
        with self._started(checkpoint.version_id, None) as engine:
            yield engine

    @contextmanager
    def of_candidate(self, folder: Path) -> Iterator[PatientModel]:
        """A candidate that is a whole model."""
        with self._started(self._claim.update_id, folder) as engine:
            yield engine.base()

    @contextmanager
    def _started(self, model_id: str, folder: Path | None) -> Iterator[PatientEngine]:
        if not self._settings.starts_engines:
            raise EngineUnavailable(
                "A whole model needs an inference engine started for it, and those at RATCHET_ENGINE_URL are "
                "not Ratchet's to start.",
                code="engine_refused",
            )
        with (
            engine_for(
                self._sessions,
                self._reads,
                self._claim,
                model_id,
                folder,
                lease=self._lease,
                journal=self._journal,
            ),
            self._engine(model_id) as engine,
        ):
            yield engine

    @contextmanager
    def _engine(self, runs: str) -> Iterator[PatientEngine]:
        scores_prompts = self._settings.scores_prompts
        with PatientEngine(
            self._reads, runs, self._lease, self._journal, scores_prompts=scores_prompts
        ) as engine:
            yield engine
