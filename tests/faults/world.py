"""A stack on either database whose workers are forked in a moment, killed, frozen and thawed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil

from artifacts.store import ArtifactStore
from domain.update import FINISHED
from registry import updates
from registry.tables import Update
from tests.faults.history import violations
from tests.worker_stack.stack import ROOT, TEAM, Stack, running_stack

LONG = os.environ.get("FAULTS") == "long"
"""Set by `make faults`; without it the tests take the short form."""


class World:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.store = ArtifactStore(stack.home / "artifacts")
        stack.environment |= {
            "RATCHET_UPDATE_TRIES": "60",
            "RATCHET_RETRY_SECONDS": "0.001",  # doubled at each loss in a row: half a minute after fifteen
            "PYTHONPATH": str(ROOT),
        }
        # Measuring is not what these tests are about: five questions and five ordinary prompts.
        general = Path(stack.environment["RATCHET_GENERAL_SUITE_DIR"])
        sums = (general / "sums.jsonl").read_text().splitlines()[:5]
        (general / "sums.jsonl").write_text("\n".join(sums))
        ordinary = [{"doc_id": n, "prompt": f"Hello, {n}!", "answers": ["Hi."]} for n in range(5)]
        (general / "ordinary.jsonl").write_text("\n".join(map(json.dumps, ordinary)))
        self._names = count(1)
        with (stack.home / "zygote.log").open("ab") as log:
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                cwd=ROOT,
                env=stack.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,
            )
        assert self._zygote.stdout is not None
        assert self._zygote.stdout.readline() == "ready\n", (stack.home / "zygote.log").read_text()[-3000:]

    def stop(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.kill()  # and the kernel all that it forked
        self._zygote.wait()
        self._zygote.stdin.close()
        self._zygote.stdout.close()
        self.stack.until(lambda: not self.stack.living(), "every process's end")

    def fork(self, role: str, *, failpoint: str = "", **order: object) -> psutil.Process:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps({"role": role, "failpoint": failpoint, **order}) + "\n")
        self._zygote.stdin.flush()
        forked = psutil.Process(int(self._zygote.stdout.readline()))
        self._zygote.stdin.write("go\n")  # before, it could be dead and gone when we look at it
        self._zygote.stdin.flush()
        return forked

    def name(self, kind: str) -> str:
        """Never the same again."""
        return f"{kind}{next(self._names)}"

    def update(self, assistant_id: str, prompts: int = 40) -> str:
        return self.stack.teach(assistant_id, self.name("skill"), prompts=prompts)

    def claim(self, update_id: str, failpoint: str = "") -> psutil.Process:
        return self.fork("claim", update=update_id, failpoint=failpoint)

    def claim_until_ended(self, claimed: psutil.Process, seconds: float = 60.0) -> None:
        self.stack.until(lambda: not alive(claimed), "the claim's end", seconds)

    def die_at(self, update_id: str, point: str, action: str = "kill") -> psutil.Process:
        """Let a claim come to the point and die or freeze there; returns it."""
        marker = self.stack.home / self.name("marker")
        process = self.claim(update_id, f"{point} {action} {marker}")
        self.stack.until(marker.exists, f"{point} being reached", 60)
        if action == "kill" and point.startswith("worker."):
            self.claim_until_ended(process)
        if action == "stop":
            self.stack.until(lambda: process.status() == psutil.STATUS_STOPPED, "the freeze", 20)
        return process

    def expire(self, update_id: str) -> None:
        """The lease of the update, if it has one, has run out."""
        self.stack.execute(
            f"UPDATE updates SET lease_until = 0 WHERE id = '{update_id}' AND status = 'running'"
        )

    def finish(self, update_id: str, seconds: float = 90.0) -> Update:
        """Claim the update again and again, as the dispatcher has it, until it ends or is paused."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            row = self.stack.update(update_id)
            if row.status in (*FINISHED, "paused"):
                return row
            self.claim_until_ended(self.claim(update_id))
        raise AssertionError(f"{update_id} has not ended: {self.log()}")

    def ask(self, verb: Callable[..., Update], update_id: str) -> Update:
        with self.stack.sessions.begin() as session:
            return verb(session, updates.get_update(session, TEAM, update_id), "user")

    def violations(self) -> list[str]:
        with self.stack.sessions.begin() as session:
            return violations(session, self.store)

    def log(self) -> str:
        return (self.stack.home / "zygote.log").read_text()[-4000:]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> None:
    if alive(process):
        process.send_signal(signal.SIGKILL)


@contextmanager
def running_world(database_url: str | None = None, *, lease_seconds: float = 60.0) -> Iterator[World]:
    """`expire` ends the lease, and no stall of the machine, but for tests in which it must run out."""
    with running_stack(lease_seconds=lease_seconds, database_url=database_url) as stack:
        world = World(stack)
        try:
            yield world
        finally:
            world.stop()
