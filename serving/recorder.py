"""Tells the ledger what answers for each alias, and what keeps the wanted version from an engine."""

import logging
import threading
from collections.abc import Callable

from serving.fleet import AliasId, Fleet

logger = logging.getLogger(__name__)

Record = Callable[[str, str, str | None, str | None], None]
"""(assistant id, alias, id of the version that answers for it, what keeps the wanted one from an engine)."""


class Recorder:
    def __init__(self, fleet: Fleet, record: Record) -> None:
        self._fleet = fleet
        self._record = record
        self._lock = threading.Lock()
        self._recorded: dict[AliasId, tuple[str | None, str | None]] = {}
        self._away = False
        """Whether the ledger took nothing when it was last told something."""

    def tell_changes(self) -> None:
        """One teller at a time, or an older state could be told last."""
        with self._lock:
            for key, state in self._fleet.states().items():
                if self._recorded.get(key, (None, None)) == state:
                    continue
                try:
                    self._record(*key, *state)
                except Exception:
                    # The ledger is away: serving goes on, and the next round tells it.
                    if not self._away:
                        logger.exception("could not record what serves")
                    self._away = True
                    return
                self._recorded[key], self._away = state, False
