"""What went wrong with an update, in words for people, and whether it may pass by itself."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from domain.errors import ArtifactsUnavailable, EngineUnavailable, RatchetError, TrainingFailed
from domain.training import ROLLOUT_SERVER_AWAY

DISK_FULL = "disk_full"
TRAINER_KILLED = "trainer_killed"
TRAINER_SILENT = "trainer_silent"
TRAINER_STOPPED = "trainer_stopped"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SCARCE = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
_STORAGE_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
_MIN_FREE_BYTES = 1 << 20
"""A disk with less counts as full: whoever wrote last may have had no room left to say so in its log."""


@dataclass(frozen=True)
class Failure:
    code: str
    message: str
    param: str | None
    may_pass: bool
    """Trying again later may help, without anybody changing the update."""

    def as_error(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "param": self.param}


def understand(error: Exception) -> Failure:
    """The failure behind an exception that ended a stage; what is not known here is a defect of ours."""
    if isinstance(error, RatchetError):
        return Failure(error.code, error.message, error.param, _may_pass(error))
    if isinstance(error, MemoryError) or _is(error, _SCARCE):
        return Failure("out_of_resources", f"The worker ran short: {_told(error)}.", None, True)
    if _is(error, _FULL):
        return Failure(DISK_FULL, f"The disk is full: {_told(error)}.", None, True)
    if _is(error, _STORAGE_AWAY):
        return Failure("storage_unavailable", f"The disk does not answer: {_told(error)}.", None, True)
    return Failure("internal_error", f"{type(error).__name__}: {error}", None, False)


def disk_is_full(folder: Path, log_tail: str) -> bool:
    """Whether a process that worked in `folder` and left this log ended for lack of space."""
    return (
        any(os.strerror(number) in log_tail for number in _FULL)
        or shutil.disk_usage(folder).free < _MIN_FREE_BYTES
    )


def _may_pass(error: RatchetError) -> bool:
    if isinstance(error, TrainingFailed):
        return error.code in (
            DISK_FULL,
            ROLLOUT_SERVER_AWAY,
            TRAINER_KILLED,
            TRAINER_SILENT,
            TRAINER_STOPPED,
        )
    if isinstance(error, ArtifactsUnavailable):
        return True
    return isinstance(error, EngineUnavailable) and error.code != "engine_refused"


def _is(error: Exception, numbers: tuple[int, ...]) -> bool:
    if isinstance(error, shutil.Error):  # a copied tree's errors, of which only the text is left
        return any(os.strerror(number) in str(error) for number in numbers)
    return isinstance(error, OSError) and error.errno in numbers


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
