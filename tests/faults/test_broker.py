"""The broker emptied, restarted without memory or frozen; the dispatcher killed: no update is lost."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from redis import Redis

from artifacts.store import ArtifactStore
from domain.failpoint import VARIABLE
from tests.faults.history import violations
from tests.worker_stack.stack import Stack, running_stack

pytestmark = pytest.mark.slow
REDISPATCH_SECONDS = 15


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as made:
        yield made


def nudges(stack: Stack, update_id: str) -> int:
    return (stack.home / "dispatcher.log").read_text().count(f"nudged {update_id}")


@pytest.mark.parametrize("fault", ["flushed", "killed", "frozen"])
def test_a_lost_message_is_sent_again_in_time(stack: Stack, fault: str) -> None:
    broker = stack.start_broker()
    stack.start_dispatcher()
    stack.until(lambda: "dispatching" in (stack.home / "dispatcher.log").read_text(), "the dispatcher", 120)
    if fault == "frozen":
        os.kill(broker.pid, signal.SIGSTOP)
    update_id = stack.teach(stack.assistant(), "route")
    if fault == "frozen":
        stack.until(lambda: "sweep failed" in (stack.home / "dispatcher.log").read_text(), "a failed sweep")
        os.kill(broker.pid, signal.SIGCONT)
    else:
        stack.until(lambda: nudges(stack, update_id) == 1, "the first nudge")
        if fault == "flushed":
            Redis(unix_socket_path=str(stack.home / "valkey.sock")).flushall()
        else:
            broker.kill()
            broker.wait()
            for path in stack.home.glob("appendonlydir/*"):
                path.unlink()
            (stack.home / "valkey.sock").unlink()
            stack.start_broker()
    before, lost = nudges(stack, update_id), time.monotonic()
    stack.until(lambda: nudges(stack, update_id) > before, "another nudge", REDISPATCH_SECONDS + 30)
    assert time.monotonic() - lost <= REDISPATCH_SECONDS


def test_a_dispatcher_killed_after_sending_sends_twice_and_the_update_runs_once(stack: Stack) -> None:
    marker = stack.home / "marker"
    stack.environment[VARIABLE] = f"dispatcher.sent kill {marker}"
    stack.start_broker()
    dispatcher = stack.start_dispatcher()
    update_id = stack.teach(stack.assistant(), "route")
    assert dispatcher.wait(60) == -signal.SIGKILL
    stack.environment[VARIABLE] = ""
    stack.start_dispatcher()
    stack.until(lambda: nudges(stack, update_id) == 1, "the second nudge")
    stack.start_worker()
    row = stack.finished(update_id, 90)
    assert (row.status, row.fence) == ("succeeded", 1)
    with stack.sessions.begin() as session:
        assert violations(session, ArtifactStore(stack.home / "artifacts")) == []
