"""`python -m trainer [--preflight] JOB.json`: JSON lines on standard output, logs on standard error.

With `--preflight` nothing is trained: one `preflight` line, with the expected cost, and `refused` where
training would be. Exit status: 0 after `done` or a report without errors; 65 after `refused`; 69 after
`failed`; 75 when stopped by SIGTERM with a checkpoint written, or when standard input closed; anything else
is a failure that a retry may mend.

RATCHET_TRAINER_PROCESSES says how many processes train together, one for each GPU, and
RATCHET_TRAINER_SHARDED=1 shares the weights out over them. So does `torchrun ... -m trainer JOB.json`, whose
own status is 0 or 1.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from domain.errors import TrainingFailed, TrainingRefused
from domain.settings import Settings
from domain.training import FailedLine, PreflightLine, RefusedLine, TrainerLine, TrainingJob
from trainer import distributed
from trainer.dry_run import preflight
from trainer.launch import launch
from trainer.lifecycle import StopRequest, die_with_parent, run_to_end
from trainer.preflight import refuse
from trainer.run import Interrupted, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer")
    parser.add_argument("job", type=Path, help="file with a TrainingJob")
    parser.add_argument("--preflight", action="store_true", help="check and measure, don't train")
    arguments = parser.parse_args()
    die_with_parent()
    processes = Settings().trainer_processes
    if processes > 1 and not distributed.launched():
        return launch(processes, sys.argv[1:])
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s"
    )
    job = TrainingJob.model_validate_json(arguments.job.read_text())
    with distributed.joined():
        try:
            if arguments.preflight:
                report = preflight(job)
                emit(PreflightLine(**report.model_dump()))
                refuse(report)
            else:
                train(job, emit, StopRequest())
        except TrainingRefused as refused:
            emit(RefusedLine(code=refused.code, message=refused.message, param=refused.param))
            return os.EX_DATAERR
        except TrainingFailed as failed:
            emit(FailedLine(code=failed.code, message=failed.message))
            return os.EX_UNAVAILABLE
        except Interrupted:
            return os.EX_TEMPFAIL
    return os.EX_OK


def emit(line: TrainerLine) -> None:
    """Processes that train together see the same lines: the first one tells them."""
    if distributed.is_first():
        print(line.model_dump_json(), flush=True)


if __name__ == "__main__":
    run_to_end(main)
