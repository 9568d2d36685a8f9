"""kill -9 of the worker at the worst moments: nothing is lost, nothing is published twice."""

import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.worker_stack.stack import Stack, running_stack

pytestmark = pytest.mark.slow
STEPS = 300
"""At a tenth of a second each, none is through with them before it is killed."""


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack(lease_seconds=8) as made:
        made.start_broker()
        made.start_dispatcher()
        yield made


def assert_published_once(stack: Stack, assistant: str, update_id: str) -> None:
    assert stack.finished(update_id).status == "succeeded"
    (version,) = stack.versions()
    assert (version.number, version.update_id) == (1, update_id)
    assert stack.champion(assistant) == 1
    assert stack.artifacts() == [version.id]
    assert len([event for event in stack.events(update_id) if event.type == "verdict"]) == 1
    assert list((stack.home / "work").iterdir()) == []


@pytest.mark.parametrize("victim", ["whole worker", "pool process"])
def test_killed_while_training_it_goes_on_from_the_last_checkpoint(stack: Stack, victim: str) -> None:
    stack.plan(steps=STEPS, step_seconds=0.1, checkpoint_every=4)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    worker = stack.start_worker()
    stack.until(lambda: len(stack.steps(update_id)) >= 10, "ten steps")
    stack.plan(steps=STEPS, step_seconds=0, checkpoint_every=4)  # the next trainer need not take its time
    (trainer,) = stack.trainers()
    child = stack.pool_child(worker)
    if victim == "whole worker":
        worker.kill()
        worker.wait()
    else:
        child.send_signal(signal.SIGKILL)
    # The trainer is a grandchild: it must not train on for an update that others will take up.
    stack.until(lambda: not psutil.pid_exists(trainer), "the trainer's death", 5)
    told = len(stack.steps(update_id))
    if victim == "whole worker":
        stack.start_worker()
    assert_published_once(stack, assistant, update_id)

    resumed = stack.steps(update_id)[told:]
    assert resumed == list(range(resumed[0], STEPS + 1))
    assert resumed[0] > 8  # the checkpoint of step 8 was there at step 10
    assert (resumed[0] - 1) % 4 == 0
    assert len(stack.trainers()) == 2


def test_killed_while_evaluating_it_does_not_train_again(stack: Stack) -> None:
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    killed = []

    def kill_once(model: str) -> None:
        if model.startswith("cand-") and not killed:
            killed.append(model)
            worker.kill()

    stack.engine.on_chat = kill_once
    worker = stack.start_worker()
    stack.until(lambda: killed, "the candidate's evaluation")
    worker.wait()
    stack.start_worker()
    assert_published_once(stack, assistant, update_id)
    assert stack.steps(update_id) == [1, 2, 3, 4]
    assert len(stack.trainers()) == 1
    assert stack.engine.loaded == {}  # neither the second claim's candidate nor the one left behind
    assert set(stack.engine.ever_loaded) == {f"cand-{update_id}-1", f"cand-{update_id}-2"}


def test_killed_between_publishing_and_finishing_it_publishes_no_second_version(stack: Stack) -> None:
    assistant = stack.assistant()
    stack.stop_serving()  # so that the worker stays in its last phase
    update_id = stack.teach(assistant, "route")
    worker = stack.start_worker()
    stack.until(lambda: stack.update(update_id).phase == "serving", "the last phase")
    worker.kill()
    worker.wait()
    stack.start_serving()
    stack.start_worker()
    assert_published_once(stack, assistant, update_id)
    assert len(stack.trainers()) == 1
