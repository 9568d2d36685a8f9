"""Several trainer processes from one: torchrun's agent, ending with the trainer's own exit status."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterable

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m trainer` with `arguments` in so many processes; returns the status of the one that
    made the others fail, if any failed.

    SIGTERM is passed on; a process that has not written its checkpoint 30 seconds later is killed.
    """
    try:
        # torchrun leaves its folder behind.
        with tempfile.TemporaryDirectory(prefix="ratchet-torchrun-") as folder:
            options = ["--standalone", "--nproc-per-node", str(processes), "--log-dir", folder]
            run(parse_args([*options, "-m", "trainer", *arguments]))
    except ChildFailedError as failed:
        cause = cause_of(failed.failures.values())
        print(f"trainer process {cause.local_rank} ended with {cause.exitcode}", file=sys.stderr)
        return cause.exitcode if cause.exitcode > 0 else 128 - cause.exitcode
    except SignalException:
        return os.EX_TEMPFAIL
    return os.EX_OK


def cause_of(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure behind the others, which torchrun has noticed to the second.

    Within one, a process that was killed made the others fail, whose connections to it closed; and SIGTERM
    is what torchrun sends to those that are left.
    """
    return min(failures, key=lambda one: (one.timestamp, one.exitcode == -signal.SIGTERM, one.exitcode > 0))
