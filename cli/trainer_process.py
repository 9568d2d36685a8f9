"""The trainer as a child process: started, listened to, stopped by Ctrl-C with a checkpoint."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from cli.components import python_path
from cli.errors import CliError
from cli.output import err
from domain.training import TRAINER_LINE, TrainerLine

TAIL_CHARACTERS = 2000
DONE = os.EX_OK
REFUSED = os.EX_DATAERR
STOPPED = os.EX_TEMPFAIL


def run_trainer(arguments: list[str], log_file: Path, on_line: Callable[[TrainerLine], None]) -> int:
    """Run `python -m trainer` with `arguments` to its end; returns DONE, REFUSED or STOPPED.

    The first Ctrl-C (or SIGTERM) asks it to stop after the running step and to write a checkpoint, the
    second kills it; both end as STOPPED. Raises CliError with the tail of its log when it fails. To be
    called from the main thread: the trainer dies with the thread that starts it.
    """
    command = [sys.executable, "-m", "trainer", *arguments]
    environment = os.environ | {"PYTHONPATH": python_path(), "TOKENIZERS_PARALLELISM": "false"}
    with log_file.open("ab") as log:
        # A group of its own: the terminal's Ctrl-C reaches it through us alone. End of file on its
        # standard input tells it that we are gone.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            process_group=0,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout, _passing_signals(process) as asked:
            try:
                for raw in process.stdout:
                    line = _parse(raw)
                    if line is None:
                        log.write(b"not a trainer line: " + raw)
                    else:
                        on_line(line)
                status = process.wait()
            finally:
                process.kill()
                process.wait()
    if status in (DONE, REFUSED, STOPPED):
        return status
    if asked:
        return STOPPED
    raise CliError(_failure(status, log_file))


@contextmanager
def _passing_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM go to the trainer; yields the list of those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            err.print("\nstopping; once more stops at once, without a checkpoint")
            process.terminate()
        else:
            process.kill()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse(raw: bytes) -> TrainerLine | None:
    try:
        return TRAINER_LINE.validate_json(raw)
    except ValidationError:  # a library that prints must not end hours of training
        return None


def _failure(status: int, log_file: Path) -> str:
    if status == -signal.SIGKILL:
        return (
            "the trainer was killed, most likely because memory ran out; a smaller batch_size or "
            "max_new_tokens needs less. The same command goes on from the last checkpoint"
        )
    how = f"signal {-status}" if status < 0 else f"status {status}"
    tail = log_file.read_bytes()[-TAIL_CHARACTERS:].decode(errors="replace").strip()
    return f"the trainer ended with {how}. End of its log:\n{tail}"
