"""`python -m tests.faults.small_disk DATABASE_URL`, where the folder for temporary files is a file system of
2 MiB: an update meets a full disk, fails over and over without harm, and succeeds once there is room."""

import os
import sys
import tempfile
import time
from pathlib import Path

from artifacts.store import ArtifactStore
from domain.settings import Settings
from tests.worker_stack.stack import Stack, running_stack
from worker.pipeline import Pipeline

TRAINER = [sys.executable, "-S", "-m", "tests.worker_stack.trainer"]


def fill() -> Path:
    ballast = Path(tempfile.gettempdir()) / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def run(stack: Stack, pipeline: Pipeline, update_id: str) -> str:
    with stack.sessions.begin() as session:
        session.connection().exec_driver_sql("UPDATE updates SET not_before = NULL")
    pipeline.run(update_id)
    return stack.update(update_id).status


def main() -> None:
    with running_stack(database_url=sys.argv[1], lease_seconds=20) as stack:
        os.environ.update(stack.environment)
        pipeline = Pipeline(
            Settings(update_tries=4, retry_seconds=0.01),
            stack.sessions,
            stack.reads,
            trainer_command=TRAINER,
            shutdown_requested=lambda: False,
        )
        assistant = stack.assistant()
        assert run(stack, pipeline, stack.teach(assistant, "route")) == "succeeded"
        (first,) = stack.versions()

        update_id = stack.teach(assistant, "refund")
        ballast = fill()
        for setbacks in (1, 2):
            assert run(stack, pipeline, update_id) == "queued"
            assert stack.update(update_id).setbacks == setbacks
        assert stack.champion(assistant) == 1
        ArtifactStore(stack.home / "artifacts").verify(first.id, first.manifest_sha256 or "")
        ballast.unlink()
        assert run(stack, pipeline, update_id) == "succeeded"
        assert stack.champion(assistant) == 2

        last = stack.teach(assistant, "address")
        ballast = fill()
        for _ in range(3):
            assert run(stack, pipeline, last) == "queued"
            time.sleep(0.02)
        assert run(stack, pipeline, last) == "failed"
        error = stack.update(last).error
        assert error is not None
        assert error["code"] == "disk_full", error
        assert stack.champion(assistant) == 2
        ballast.unlink()


if __name__ == "__main__":
    main()
