"""Several trainer processes from one: torchrun's agent, ending with the trainer's own exit status."""

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m trainer` with `arguments` in so many processes; returns the status of the one that
    ended first if any failed.

    SIGTERM is passed on; a process that has not written its checkpoint 30 seconds later is killed.
    """
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(processes), "-m", "trainer", *arguments]))
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        print(f"trainer process {first.local_rank} ended with {first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:
        return os.EX_TEMPFAIL
    return os.EX_OK
