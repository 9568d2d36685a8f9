"""Run a command so that it dies with the process that started it.

Executed as a script: `python -I -S launch.py PARENT_PID SIGNAL COMMAND...`. The kernel sends SIGNAL to
the command when the parent dies, also by kill -9. A separate script rather than a `preexec_fn`, which
may deadlock when the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, death_signal: int) -> None:
    """Ask the kernel for `death_signal` when the thread that forked this process ends.

    Raises SystemExit when `parent` is already gone: the request would then never fire.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
