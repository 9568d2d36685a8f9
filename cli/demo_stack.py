"""The demo's own stack: `ratchet up` in a child process on a free port."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from cli.components import python_path
from cli.errors import CliError
from cli.output import err
from cli.supervisor import spawn

START_SECONDS = 1800.0
STOP_SECONDS = 90.0


class OwnStack:
    """Starts on entering, stops on leaving; a temporary home is removed when all went well.

    Raises CliError with the end of the log when the stack does not start or does not stop cleanly.
    """

    def __init__(self, home: Path | None) -> None:
        self.url = ""
        self._temporary = home is None
        self.home = home or Path(tempfile.mkdtemp(prefix="ratchet-demo-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the supervisor, inside the block."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        return self.home / "logs" / "up.log"

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ) | {"PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "cli", "up", "--home", str(self.home), "--port", "0"]
        with self.log.open("wb") as log:
            # SIGTERM, so that the stack stops in order when the demo is killed.
            self._process = spawn(
                command,
                death_signal=signal.SIGTERM,
                environment=environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            self.url = self._ready_url(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self._stop()
        if kind is None and status != 0:
            raise CliError(f"the stack did not stop cleanly (status {status}); its log is {self.log}")
        if not self._temporary:
            return
        if kind is None:
            shutil.rmtree(self.home)
        else:
            err.print(f"the demo's home is kept, with all logs: {self.home}")

    def _ready_url(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            readable, _, _ = select.select([process.stdout], [], [], 1.0)
            if readable:
                line = process.stdout.readline().decode().strip()
                if line.startswith("ready "):
                    return line.removeprefix("ready ")
                if not line:
                    break
        tail = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise CliError(f"the stack did not start; the end of {self.log}:\n  {tail}")

    def _stop(self) -> int:
        """The stack's exit status."""
        process = self._process
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its children die with it
            return process.wait()
        finally:
            if process.stdout is not None:
                process.stdout.close()
