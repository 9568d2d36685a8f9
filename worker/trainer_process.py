"""The trainer as a process of its own: started, listened to, stopped, and its ending understood.

It leads its own process group, holds the read end of our pipe as standard input (end of file tells it
that we are gone; it also asks the kernel to die with us), writes one TrainerLine per line to standard
output and logs to standard error.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError

from domain.errors import TrainingFailed, TrainingRefused
from domain.training import TRAINER_LINE, DoneLine, FailedLine, RefusedLine, TrainerLine
from worker.lease import Stop
from worker.leftovers import LOG
from worker.setbacks import DISK_FULL, TRAINER_SILENT, TRAINER_STOPPED, disk_is_full

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
GRACE_SECONDS = 45.0
"""Between SIGTERM and SIGKILL: a step must end and a checkpoint be written."""
TAIL_CHARACTERS = 2000
STATUS_REFUSED = os.EX_DATAERR
STATUS_STOPPED = os.EX_TEMPFAIL


class Ending(StrEnum):
    """How a trainer ended without being at fault."""

    DONE = "done"
    STOPPED = "stopped"
    """It gave way to a request and left a checkpoint."""
    KILLED = "killed"
    """SIGKILL from outside, as the kernel does when memory runs out."""


def run_trainer(
    command: list[str],
    job_file: Path,
    *,
    threads: int,
    silence_seconds: float,
    on_line: Callable[[TrainerLine], None],
    stop: Callable[[], Stop | None],
) -> Ending:
    """Run one trainer to its end. Must be called from the main thread: the kernel ties the trainer's
    life to the thread that forks it.

    Raises TrainingRefused with preflight's reason, TrainingFailed with the tail of its log or when it says
    nothing for `silence_seconds`, and whatever `on_line` raises; in every case no process of the trainer's
    group is left.
    """
    log_file = job_file.with_name(LOG)
    last: TrainerLine | None = None
    asked_at: float | None = None
    with _started([*command, str(job_file)], log_file, threads) as process:
        lines = _lines_of(process)
        heard_at = time.monotonic()
        while True:
            try:
                raw = lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if process.poll() is not None:  # what it left behind holds the pipe open
                    _signal_group(process, signal.SIGKILL)
                elif time.monotonic() - heard_at > silence_seconds:
                    raise _silent(silence_seconds, log_file) from None
            else:
                heard_at = time.monotonic()
                if raw is None:
                    break
                line = _parse(raw)
                if line is not None:
                    last = line
                    on_line(line)
            asked_at = _heed(stop(), process, asked_at)
        status = _wait(process)
    return _understand(status, last, stopped=asked_at is not None, log_file=log_file)


def _understand(status: int, last: TrainerLine | None, *, stopped: bool, log_file: Path) -> Ending:
    if isinstance(last, RefusedLine):
        raise TrainingRefused(last.message, param=last.param, code=last.code)
    if isinstance(last, FailedLine):
        raise TrainingFailed(last.message, code=last.code)
    if status == 0 and isinstance(last, DoneLine):
        return Ending.DONE
    if stopped or status == STATUS_STOPPED:
        return Ending.STOPPED
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Ending.KILLED
    how = f"signal {-status}" if status < 0 else f"status {status}"
    told = tail(log_file)
    raise TrainingFailed(
        f"The trainer ended with {how} before it was done. End of its log:\n{told}",
        code=DISK_FULL if disk_is_full(log_file.parent, told) else "trainer_crashed",
    )


def _silent(seconds: float, log_file: Path) -> TrainingFailed:
    return TrainingFailed(
        f"The trainer said nothing for {seconds:.0f} s. End of its log:\n{tail(log_file)}",
        code=TRAINER_SILENT,
    )


def tail(log_file: Path) -> str:
    """The last lines of a log, at most TAIL_CHARACTERS."""
    with log_file.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - TAIL_CHARACTERS))
        return log.read().decode(errors="replace").strip() or "(empty)"


def _heed(reason: Stop | None, process: subprocess.Popen[str], asked_at: float | None) -> float | None:
    """Returns when the trainer was first asked to stop, on the monotonic clock."""
    if reason is None:
        return asked_at
    now = time.monotonic()
    # A checkpoint is worth waiting for only when this update goes on from it and it is still ours.
    gently = reason in (Stop.SHUTDOWN, Stop.PAUSE)
    if not gently or (asked_at is not None and now - asked_at > GRACE_SECONDS):
        _signal_group(process, signal.SIGKILL)
    elif asked_at is None:
        _signal_group(process, signal.SIGTERM)
    return asked_at or now


@contextlib.contextmanager
def _started(command: list[str], log_file: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    lock_file = log_file.with_name("trainer.pid")
    with log_file.open("ab") as log, _sole_trainer(lock_file) as lock:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            errors="replace",
            process_group=0,
            pass_fds=(lock,),
        )
        lock_file.write_text(str(process.pid))
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def _sole_trainer(lock_file: Path) -> Iterator[int]:
    """A lock for the trainer to inherit and so to hold for as long as it lives.

    Whoever holds it when we come belongs to an earlier claim (a frozen worker's, say): our newer fence
    entitles us to kill it before it writes another checkpoint beside ours.
    """
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take_over(descriptor, lock_file)
        os.ftruncate(descriptor, 0)  # an id in it is always that of the trainer that holds it
        yield descriptor
    finally:
        os.close(descriptor)


def _take_over(descriptor: int, lock_file: Path) -> None:
    """Raises TrainingFailed, which may pass, when the lock is still held after GRACE_SECONDS.

    Without an id in the file the worker that started the holder was cut off before it had noted it. If that
    worker is dead, so is its trainer soon: its standard input has closed.
    """
    until = time.monotonic() + GRACE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stale = lock_file.read_text()
        if time.monotonic() > until:
            raise TrainingFailed("A trainer of an earlier claim has not ended.", code=TRAINER_STOPPED)
        if stale:
            logger.warning("killing trainer %s of an earlier claim", stale)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(stale), signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _lines_of(process: subprocess.Popen[str]) -> "queue.Queue[str | None]":
    """Standard output line by line; None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed under us when the trainer is abandoned
            for raw in process.stdout:
                lines.put(raw)
        lines.put(None)

    threading.Thread(target=read, name="trainer-output", daemon=True).start()
    return lines


def _parse(raw: str) -> TrainerLine | None:
    if not raw.strip():
        return None
    try:
        return TRAINER_LINE.validate_python(json.loads(raw))
    except (json.JSONDecodeError, ValidationError) as error:
        # A library that prints must not end hours of training; a lost `done` still fails the update.
        logger.warning("not a trainer line: %.200r (%s)", raw, error)
        return None


def _wait(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        return process.wait()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
