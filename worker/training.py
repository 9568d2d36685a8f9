"""The training stage: one trainer's run as the update sees it."""

import shutil
from pathlib import Path

from domain.errors import TrainingFailed
from worker.journal import Journal
from worker.lease import Lease
from worker.setbacks import TRAINER_KILLED, TRAINER_STOPPED
from worker.trainer_process import Ending, run_trainer


def train(
    command: list[str],
    job_file: Path,
    output: Path,
    *,
    threads: int,
    silence_seconds: float,
    lease: Lease,
    journal: Journal,
) -> None:
    """Fill `output` with the candidate.

    Raises Interrupted when the lease says so, TrainingRefused, TrainingFailed; a trainer that somebody
    else stopped or killed (as the kernel does when memory runs out) is a failure that may pass.
    """
    shutil.rmtree(output, ignore_errors=True)
    ending = run_trainer(
        command,
        job_file,
        threads=threads,
        silence_seconds=silence_seconds,
        on_line=journal.hear,
        stop=lease.stop,
    )
    if ending == Ending.DONE:
        return
    lease.check()
    if ending == Ending.STOPPED:
        raise TrainingFailed("The trainer was stopped from outside.", code=TRAINER_STOPPED)
    raise TrainingFailed(
        "The trainer was killed: most likely memory ran out. A smaller batch_size or max_new_tokens needs "
        "less.",
        code=TRAINER_KILLED,
    )
