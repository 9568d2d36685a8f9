"""The worker's processes: Celery, the dispatcher and the broker, each in its own, stopped and frozen."""

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.worker_stack.stack import PATIENCE, Stack, running_stack

pytestmark = pytest.mark.slow
LONG = 600
"""Steps that no test waits for, at a tenth of a second each."""


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """With the test's own lease, if it waits for one to run out."""
    with running_stack(**getattr(request, "param", {})) as made:
        yield made


def test_sigterm_gives_the_update_back_with_a_checkpoint(stack: Stack) -> None:
    stack.plan(steps=LONG, step_seconds=0.1, checkpoint_every=LONG)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    stack.start_broker()
    worker = stack.start_worker()
    dispatcher = stack.start_dispatcher()
    stack.until(lambda: len(stack.steps(update_id)) >= 3, "three steps")
    expected = {worker.pid, stack.pool_child(worker).pid, dispatcher.pid, *stack.trainers()}
    assert len(expected) == 4
    assert {process.pid for process in stack.living()} == expected
    dispatcher.terminate()
    assert dispatcher.wait(PATIENCE) == 0
    worker.terminate()
    assert worker.wait(LONG * 0.1) == 0  # with no other step than the running one and the checkpoint after it
    update = stack.update(update_id)
    assert (update.status, update.lease_until) == ("queued", None)
    before = stack.steps(update_id)
    assert len(before) < LONG
    assert stack.living() == []

    stack.plan(steps=len(before) + 10)
    stack.start_worker()
    stack.start_dispatcher()
    assert stack.finished(update_id).status == "succeeded"
    assert stack.steps(update_id) == list(range(1, len(before) + 11))
    assert stack.champion(assistant) == 1


def test_an_update_posted_without_a_broker_runs_when_there_is_one(stack: Stack) -> None:
    update_id = stack.teach(stack.assistant(), "route")
    stack.start_worker()
    stack.start_dispatcher()
    stack.until(lambda: "sweep failed" in (stack.home / "dispatcher.log").read_text(), "a failed sweep")
    stack.start_broker()
    assert stack.finished(update_id).status == "succeeded"


def test_a_broker_that_loses_everything_loses_no_update(stack: Stack) -> None:
    """Its message is gone before the worker comes; the dispatcher, which had sent it, sends it again."""
    update_id = stack.teach(stack.assistant(), "route")
    broker = stack.start_broker()
    stack.start_dispatcher()
    stack.until(lambda: update_id in (stack.home / "dispatcher.log").read_text(), "the first nudge")
    broker.kill()
    broker.wait()
    for path in stack.home.glob("appendonlydir/*"):
        path.unlink()
    (stack.home / "valkey.sock").unlink()
    stack.start_broker()
    stack.start_worker()
    assert stack.finished(update_id).status == "succeeded"
    assert len(stack.versions()) == 1


@pytest.mark.parametrize("stack", [{"lease_seconds": 8.0}], indirect=True, ids=[""])
def test_a_frozen_worker_is_replaced_and_publishes_nothing_when_it_thaws(stack: Stack) -> None:
    stack.plan(steps=LONG, step_seconds=0.1, checkpoint_every=5)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    stack.start_broker()
    frozen = stack.start_worker()
    stack.start_dispatcher()
    stack.until(lambda: len(stack.steps(update_id)) >= 6, "the first checkpoint")
    (stale_trainer,) = stack.trainers()
    child = stack.pool_child(frozen)
    for process in (psutil.Process(frozen.pid), child):
        process.suspend()
    stack.plan(steps=6)  # its successor has little left to do
    stack.start_worker()
    assert stack.finished(update_id).status == "succeeded"
    assert not psutil.pid_exists(stale_trainer) or (
        psutil.Process(stale_trainer).status() == psutil.STATUS_ZOMBIE
    )
    published = stack.versions()
    for process in (child, psutil.Process(frozen.pid)):
        process.resume()
    # Its task ends: Celery replaces a pool process after every task.
    stack.until(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the thawed task's end"
    )
    assert [version.id for version in stack.versions()] == [version.id for version in published]
    assert len(published) == 1
    assert stack.update(update_id).fence == 2
    assert stack.artifacts() == [published[0].id]


def test_the_dispatcher_ends_promptly_while_the_broker_is_frozen(stack: Stack) -> None:
    broker = stack.start_broker()
    dispatcher = stack.start_dispatcher()
    stack.until(lambda: "dispatching" in (stack.home / "dispatcher.log").read_text(), "the dispatcher")
    os.kill(broker.pid, signal.SIGSTOP)
    stack.teach(stack.assistant(), "route")
    stack.until(lambda: "sweep failed" in (stack.home / "dispatcher.log").read_text(), "a failed sweep")
    dispatcher.terminate()
    assert dispatcher.wait(20) == 0  # a frozen broker costs two seconds; without a limit it would be for ever
