"""Run a command that has children of its own, so that all of them die with the process that started it.

Executed as a script: `python -I -S guard.py PARENT_PID COMMAND...`, leading a process group of its own and
tied to the parent by SIGTERM (see `launch`). The kernel's death signal reaches one process; vLLM's engine
and worker processes would outlive their server and keep its memory. So this one stays, and when the parent
dies it kills the whole group.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

LAUNCH = Path(__file__).with_name("launch.py")


def main(parent: int, command: list[str]) -> int:
    """Exit status of the command, 128 + signal when one ended it."""
    launcher = [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), str(int(signal.SIGKILL))]
    child: subprocess.Popen[bytes] | None = None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        """SIGTERM comes from the kernel when the parent has died, else from the parent."""
        if os.getppid() != parent or child is None:
            os.killpg(0, signal.SIGKILL)
        else:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    child = subprocess.Popen(launcher + command)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
