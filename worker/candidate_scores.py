"""What the candidate of an update scored so far, kept in its work folder until it is a version.

The ledger holds measurements of versions, and a candidate is none yet: without these files a worker that
dies in the evaluation would cost all of it.
"""

import hashlib
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from domain.measurement import ItemScore, Measurement, SuiteKind

logger = logging.getLogger(__name__)


class CandidateScores:
    """One file per suite in `folder`; a file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self, kind: SuiteKind, suite: str) -> dict[str, ItemScore]:
        """By item id; empty for a suite that no claim has measured to its end."""
        path = self._path(kind, suite)
        try:
            measurement = Measurement.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            logger.warning("%s is measured again: %s", suite, error)
            return {}
        return {item.item: item for item in measurement.items}

    def keep(self, measurement: Measurement) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._path(measurement.kind, measurement.suite)
        staged = path.with_suffix(f".{os.getpid()}")
        with staged.open("w", encoding="utf-8") as file:
            file.write(measurement.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)

    def _path(self, kind: SuiteKind, suite: str) -> Path:
        # A skill's name need not be a file name.
        return self._folder / f"{kind}-{hashlib.sha256(suite.encode()).hexdigest()[:16]}.json"
