"""How the process that runs an update learns that its Celery worker is asked to stop.

A warm shutdown waits for the running task, which may take hours, and tells the pool's child nothing.
So the parent holds the write end of a pipe: when it shuts down (or dies) the child reads end of file.
A SIGTERM sent to the child itself, as a supervisor does that signals a whole group, means the same.
"""

import os
import select
import signal
from types import FrameType
from typing import Any

_read_end: int | None = None
_write_end: int | None = None
_terminated = False


def prepare(**_: Any) -> None:
    """In the parent, before the pool forks."""
    global _read_end, _write_end
    if _read_end is None:
        _read_end, _write_end = os.pipe()


def enter_child(**_: Any) -> None:
    """In the pool's child: let go of the inherited write end, or end of file never comes."""
    announce()


def announce(**_: Any) -> None:
    """In the parent's signal handler: nothing here may block."""
    global _write_end
    if _write_end is not None:
        write_end, _write_end = _write_end, None
        os.close(write_end)


def heed_sigterm() -> None:
    """Let SIGTERM ask for a stop instead of unwinding the main thread in the middle of a write."""
    signal.signal(signal.SIGTERM, _note_sigterm)


def _note_sigterm(_signal: int, _frame: FrameType | None) -> None:
    global _terminated
    _terminated = True


def requested() -> bool:
    """Whether this worker is asked to stop; cheap enough to ask between any two items."""
    if _terminated:
        return True
    if _read_end is None:
        return False
    readable, _, _ = select.select([_read_end], [], [], 0)
    return bool(readable)
