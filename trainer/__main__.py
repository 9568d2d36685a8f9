"""`python -m trainer JOB.json`: JSON lines on standard output, logs on standard error.

Exit status: 0 after `done`; 65 after `refused`; 75 when stopped by SIGTERM with a checkpoint written, or
when standard input closed; anything else is a failure that a retry may mend.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from domain.errors import TrainingRefused
from domain.training import RefusedLine, TrainerLine, TrainingJob
from trainer.lifecycle import StopRequest, die_with_parent
from trainer.run import Interrupted, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer")
    parser.add_argument("job", type=Path, help="file with a TrainingJob")
    arguments = parser.parse_args()
    die_with_parent()
    stop_requested = StopRequest()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s trainer %(levelname)s %(message)s"
    )
    job = TrainingJob.model_validate_json(arguments.job.read_text())
    try:
        train(job, emit, stop_requested)
    except TrainingRefused as refused:
        emit(RefusedLine(code=refused.code, message=refused.message, param=refused.param))
        return os.EX_DATAERR
    except Interrupted:
        return os.EX_TEMPFAIL
    return os.EX_OK


def emit(line: TrainerLine) -> None:
    print(line.model_dump_json(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
