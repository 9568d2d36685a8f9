"""What the swap controller asks of whoever starts engines."""

import time
from collections.abc import Callable, Mapping, Sequence

RENEW_SECONDS = 15.0
"""Well below the minute that a demand lasts."""
LOOK_SECONDS = 1.0
"""While an engine is missing: the reason may have changed."""


class Demands:
    """Renews the demands and takes them back, not with every look at the ledger. One thread at a time."""

    def __init__(self, demand: Callable[[Sequence[str]], Mapping[str, str]]) -> None:
        self._demand = demand
        self._asked: set[str] = set()
        self._asked_at = 0.0
        self.problems: Mapping[str, str] = {}
        """By full version's id: why no engine runs it."""

    def renew(self, checkpoints: set[str], running: set[str]) -> None:
        """After this `checkpoints` are asked for and no others; `running`: what engines ran a moment ago."""
        if not checkpoints and not self._asked:
            return
        seconds = RENEW_SECONDS if checkpoints <= running else LOOK_SECONDS
        if checkpoints == self._asked and time.monotonic() - self._asked_at < seconds:
            return
        self.problems = self._demand(sorted(checkpoints))
        self._asked, self._asked_at = checkpoints, time.monotonic()
