"""Start processes, keep their logs, restart what crashes, stop everything in reverse order.

Every child leads its own session and dies with this process (see `launch`). The kernel ties that to
the thread that forked: `Supervisor` must be used from the main thread only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from cli import launch

BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
STABLE_SECONDS = 60.0
"""A child that lived this long starts again without memory of earlier crashes."""
LOG_BYTES = 10_000_000
"""A log above this is moved to `<name>.log.1` when its component starts."""
LAST_WORDS_SECONDS = 2.0
"""For the rest of an ended child's log, which says why; what left its group may hold the pipe open."""
_SHOW = threading.Lock()


@dataclass(frozen=True)
class Component:
    """A process to keep running."""

    name: str
    command: Callable[[], list[str]]
    """Asked at every start, because a port may have to change."""
    environment: dict[str, str]
    stop_seconds: float = 10.0
    """Between SIGTERM and SIGKILL."""
    pass_fds: tuple[int, ...] = ()
    ready_mark: str | None = None
    """Text of the log line by which it says that it is ready, when it cannot be asked."""


class StopRequest:
    """How often this process was asked to stop; a second time means: hurry.

    Plain numbers, because the signal handler may interrupt any code: a lock could be held already.
    """

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)
        return self

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def hurry(self) -> bool:
        return self.count > 1


def spawn(
    command: list[str],
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    environment: dict[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in its own session, tied to this process by `death_signal`.

    Raises RuntimeError off the main thread, where the kernel would kill the child with the thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children are started from the main thread only")
    launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen(
        launcher + command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def stop_group(process: subprocess.Popen[bytes], seconds: float, hurry: Callable[[], bool]) -> None:
    """SIGTERM to the process; SIGKILL to its group after `seconds`, or at once when `hurry` says so."""
    if process.poll() is None:
        process.terminate()
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Child:
    """A component's present process and its past."""

    component: Component
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    crashes: int = 0
    """In a row, each sooner than STABLE_SECONDS after its start."""
    restart_at: float | None = None
    marked: bool = False
    """Whether the present process has logged its ready mark."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=15))
    _pump: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.marked = False
        self.process = spawn(
            self.component.command(),
            environment=self.component.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=self.component.pass_fds,
        )
        self.started_at, self.restart_at = time.monotonic(), None
        self._pump = threading.Thread(
            target=self._copy_log, args=(self.process.stdout,), name=f"log-{self.component.name}", daemon=True
        )
        self._pump.start()

    def note_exit(self, now: float) -> int | None:
        """When the process has ended: schedule its restart and return its status, else None."""
        if self.process is None or self.restart_at is not None or self.process.poll() is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind in its group
        self._hear_out()
        self.crashes = 1 if now - self.started_at >= STABLE_SECONDS else self.crashes + 1
        self.restart_at = now + BACKOFF_SECONDS[min(self.crashes, len(BACKOFF_SECONDS)) - 1]
        return int(self.process.returncode)

    def ask_to_stop(self) -> None:
        """Once; never started again."""
        self.restart_at = None
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self, hurry: Callable[[], bool]) -> None:
        self.restart_at = None
        if self.process is None:
            return
        stop_group(self.process, self.component.stop_seconds, hurry)
        self._hear_out()
        self.process = None

    def _hear_out(self) -> None:
        """Until the log and `tail` have its last words."""
        if self._pump is not None:
            self._pump.join(LAST_WORDS_SECONDS)

    def _copy_log(self, stream: IO[bytes]) -> None:
        """To the log file, to standard error with the component's name, and to `tail`."""
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        mark = self.component.ready_mark
        with self.log_file.open("ab") as log, stream:
            for raw in stream:
                with contextlib.suppress(OSError):  # a full disk must not block the child on its pipe
                    log.write(raw)
                    log.flush()
                line = raw.decode(errors="replace").rstrip()
                self.tail.append(line)
                if mark is not None and mark in line:
                    self.marked = True
                say(self.component.name, line)


def say(name: str, line: str) -> None:
    """One log line on standard error; a closed standard error must not stop the stack."""
    with _SHOW, contextlib.suppress(OSError, ValueError):
        print(f"{name:<10} | {line}", file=sys.stderr, flush=True)


class Supervisor:
    """The running children, in the order in which they were started."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._children: list[Child] = []
        self._leaving: list[tuple[Child, float]] = []
        """With the time after which they are killed (time.monotonic)."""
        log_dir.mkdir(parents=True, exist_ok=True)

    def add(self, component: Component) -> Child:
        child = Child(component, self._log_dir / f"{component.name}.log")
        self._children.append(child)
        child.start()
        return child

    def retire(self, child: Child) -> None:
        """Stop a child for good without waiting for it: `poll` sees to its end."""
        say("supervisor", f"stopping {child.component.name}")
        self._children.remove(child)
        child.ask_to_stop()
        self._leaving.append((child, time.monotonic() + child.component.stop_seconds))

    def poll(self) -> list[Child]:
        """Notice what ended, start what is due again; returns the children that ended since last time."""
        now, ended = time.monotonic(), []
        for child, kill_at in list(self._leaving):
            if not child.alive or now > kill_at:
                self._leaving.remove((child, kill_at))
                child.stop(lambda: True)
        for child in self._children:
            status = child.note_exit(now)
            if status is not None:
                wait = (child.restart_at or now) - now
                how = f"signal {-status}" if status < 0 else f"status {status}"
                say("supervisor", f"{child.component.name} ended with {how}; next start in {wait:.1f} s")
                ended.append(child)
            elif child.restart_at is not None and child.restart_at <= now:
                child.start()
        return ended

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Stop all, last started first. Bounded by the sum of the components' `stop_seconds`."""
        for child, _ in self._leaving:
            child.stop(hurry)
        self._leaving.clear()
        while self._children:
            child = self._children.pop()
            say("supervisor", f"stopping {child.component.name}")
            child.stop(hurry)
