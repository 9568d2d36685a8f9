"""A real trainer that stands still after its first step until somebody has asked it to stop: however long
that takes, it is not through with its steps."""

import re
import signal
import time
from pathlib import Path

import psutil

PATIENCE = 120.0
"""Seconds until something counts as never coming."""


def failpoint_value(marker: Path) -> str:
    """Of RATCHET_FAILPOINT, for the process that starts the trainer."""
    return f"trainer.step stop {marker}"


def await_standing(parent: int) -> psutil.Process:
    """The trainer that the process `parent` has started, once it stands still."""
    deadline = time.monotonic() + PATIENCE
    while True:
        for child in psutil.Process(parent).children():
            if child.status() == psutil.STATUS_STOPPED:
                return child
        assert time.monotonic() < deadline, "no trainer stands still"
        time.sleep(0.05)


def go_on_once_asked(trainer: psutil.Process) -> None:
    """Let it go on when SIGTERM waits for it."""
    deadline = time.monotonic() + PATIENCE
    while not _is_pending(trainer.pid, signal.SIGTERM):
        assert time.monotonic() < deadline, "nobody asked the trainer to stop"
        time.sleep(0.05)
    trainer.resume()


def _is_pending(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)
