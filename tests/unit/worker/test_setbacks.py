"""Which failures are tried again, and what is said of them."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from domain.errors import CorruptArtifact, EngineUnavailable, TrainingFailed, TrainingRefused
from worker import setbacks
from worker.setbacks import disk_is_full, understand


@pytest.mark.parametrize(
    ("error", "code", "may_pass"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), "disk_full", True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full", True),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a'")]), "disk_full", True),
        (OSError(errno.EMFILE, "Too many open files"), "out_of_resources", True),
        (MemoryError(), "out_of_resources", True),
        (OSError(errno.ESTALE, "Stale file handle"), "storage_unavailable", True),
        (TrainingFailed("killed", code="trainer_killed"), "trainer_killed", True),
        (TrainingFailed("full", code="disk_full"), "disk_full", True),
        (TrainingFailed("away", code="rollout_server_away"), "rollout_server_away", True),
        (TrainingFailed("crashed", code="trainer_crashed"), "trainer_crashed", False),
        (TrainingRefused("no gap", code="teacher_gap_too_small"), "teacher_gap_too_small", False),
        (EngineUnavailable("away"), "engine_unavailable", True),
        (EngineUnavailable("no such rank", code="engine_refused"), "engine_refused", False),
        (CorruptArtifact("bad header"), "corrupt_artifact", False),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "internal_error", False),
        (KeyError("x"), "internal_error", False),
    ],
)
def test_what_may_pass(error: Exception, code: str, may_pass: bool) -> None:
    failure = understand(error)
    assert (failure.code, failure.may_pass) == (code, may_pass)
    assert failure.message


def test_a_full_disk_is_known_by_the_log_or_by_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not disk_is_full(tmp_path, "RuntimeError: the loss is not finite")
    assert disk_is_full(tmp_path, f"SafetensorError: {os.strerror(errno.ENOSPC)} (os error 28)")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(setbacks.shutil, "disk_usage", lambda _: usage._replace(free=4096))
    assert disk_is_full(tmp_path, "")
