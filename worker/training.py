"""The training stage: one trainer after another until the candidate is there."""

import shutil
from pathlib import Path

from domain.errors import TrainingFailed
from domain.training import CheckpointLine, TrainerLine
from worker.journal import Journal
from worker.lease import Interrupted, Lease, Stop
from worker.trainer_process import Ending, run_trainer


def train(
    command: list[str],
    job_file: Path,
    output: Path,
    *,
    threads: int,
    lease: Lease,
    journal: Journal,
) -> None:
    """Fill `output` with the candidate's adapter.

    A trainer that is killed from outside is started again from its newest checkpoint, as long as each
    start gets further than the one before: a lack of memory at the same step ends the update.
    Raises Interrupted, TrainingRefused, TrainingFailed.
    """
    reached = 0

    def hear(line: TrainerLine) -> None:
        nonlocal reached
        if isinstance(line, CheckpointLine):
            reached = max(reached, line.step)
        journal.hear(line)

    killed_at: int | None = None
    while True:
        shutil.rmtree(output, ignore_errors=True)
        ending = run_trainer(command, job_file, threads=threads, on_line=hear, stop=lease.stop)
        if ending == Ending.DONE:
            return
        lease.check()
        if ending == Ending.STOPPED:  # by someone else than us: give the update back
            raise Interrupted(Stop.SHUTDOWN)
        if killed_at == reached:
            raise TrainingFailed(
                f"The trainer was killed twice at the same point, after the checkpoint of step {reached}: "
                "most likely memory ran out. A smaller batch_size or max_new_tokens needs less.",
                code="trainer_killed",
            )
        killed_at = reached
        journal.tell(
            f"The trainer was killed; starting it again from the checkpoint of step {reached}.",
            level="warning",
        )
