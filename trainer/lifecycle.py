"""How the process ends: with its worker, or asked by SIGTERM."""

import ctypes
import logging
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from trainer import distributed

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, and exit when standard input closes.

    The second covers a parent that died before the first took effect, and a worker's thread ending.
    Standard input is watched only when it is a pipe or a socket: a terminal or /dev/null holds nothing.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    mode = os.fstat(0).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=_exit_at_eof, name="stdin-watch", daemon=True).start()


def _exit_at_eof() -> None:
    while os.read(0, 4096):
        pass
    os._exit(os.EX_TEMPFAIL)


def run_to_end(main: Callable[[], int]) -> NoReturn:
    """Run `main` and leave with its status, or with 1 after an exception, which goes to standard error.

    Of processes that train together the first to fail tells where: in the others it is only a closed
    connection, and their tracebacks would bury the reason in the log.
    """
    try:
        status = main()
    except Exception as error:
        status = 1
        if distributed.fails_first():
            traceback.print_exc()
        else:
            summary = traceback.format_exception_only(error)[-1].strip()
            print(f"trainer process {distributed.rank()} failed after another: {summary}", file=sys.stderr)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process with what it printed flushed, and without the interpreter's teardown.

    Once weights were shared out, torch keeps the process group and its threads past destroy_process_group
    (DTensor's caches hold it), and a thread that wants the interpreter while that is torn down aborts the
    process ("terminate called without an active exception"), whose work is already done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Set by SIGTERM; the run reads it between steps."""

    def __init__(self) -> None:
        self._set = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def __call__(self) -> bool:
        return self._set

    def _on_signal(self, number: int, frame: object) -> None:
        self._set = True
