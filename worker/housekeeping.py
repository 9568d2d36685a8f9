"""Keeps the version store tidy while the dispatcher runs."""

import logging
import threading
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from artifacts.opening import open_store
from artifacts.sweep import sweep
from domain.errors import RatchetError
from domain.settings import Settings
from registry import retention
from registry.retention import Policy

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 3600.0


class Housekeeper:
    """The ledger's side of a sweep; each method is a transaction of its own."""

    def __init__(
        self, settings: Settings, sessions: sessionmaker[Session], reads: sessionmaker[Session]
    ) -> None:
        self._sessions = sessions
        self._reads = reads
        self._store = open_store(settings)
        self._grace_seconds = settings.artifacts_grace_hours * 3600
        keep = settings.keep_versions
        self._policy = None if keep is None else Policy(keep, self._grace_seconds)

    def run(self, ended: threading.Event) -> None:
        """Sweep now and every hour until `ended`; a round that fails is tried again by the next one."""
        while not ended.is_set():
            try:
                sweep(self._store, self, grace_seconds=self._grace_seconds)
            except (SQLAlchemyError, RatchetError, OSError) as error:
                logger.warning("could not tidy the version store: %s", error)
            ended.wait(INTERVAL_SECONDS)

    def prunable(self) -> Sequence[str]:
        """Nothing unless the settings say how many versions to keep."""
        if self._policy is None:
            return []
        with self._reads() as session:
            return retention.prunable(session, self._policy)

    def prune(self, version_id: str) -> bool:
        assert self._policy is not None  # or nothing was prunable
        with self._sessions.begin() as session:
            return retention.prune(session, version_id, self._policy)

    def unneeded(self, stored: Sequence[str]) -> Sequence[str]:
        with self._reads() as session:
            return retention.unneeded_ids(session, stored)
