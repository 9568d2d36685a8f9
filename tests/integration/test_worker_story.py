"""The story of an update with a real ledger, real files and a trainer process, worked in this process."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, event

from domain import failpoint
from domain.settings import Settings
from domain.update import FINISHED
from registry import assistants, measurements, updates
from registry.tables import Update
from tests.worker_stack.stack import TEAM, Stack, running_stack
from worker import patient_engine, pipeline
from worker.pipeline import Pipeline

TRAINER = [sys.executable, "-m", "tests.worker_stack.trainer"]
LONG = 600
"""Steps that no test waits for, at a tenth of a second each."""


class Desk:
    """A pipeline in this process, as the task runs it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.shutdown = False
        self.pipeline = Pipeline(
            Settings(update_tries=3, retry_seconds=0.01),
            stack.sessions,
            stack.reads,
            trainer_command=TRAINER,
            shutdown_requested=lambda: self.shutdown,
        )

    def run(self, update_id: str) -> Update:
        self.pipeline.run(update_id)
        return self.stack.update(update_id)

    def run_until_finished(self, update_id: str) -> Update:
        for _ in range(20):
            update = self.run(update_id)
            if update.status in FINISHED:
                return update
            time.sleep(0.02)
        raise AssertionError(f"{update_id} is {update.status}")

    def during_step(self, step: int, update_id: str, act: Callable[[], None]) -> None:
        """Do something once, when the trainer has reported the step."""
        journal_hear = pipeline.Journal.hear
        done = []

        def hear(journal: pipeline.Journal, line) -> None:  # type: ignore[no-untyped-def]
            journal_hear(journal, line)
            if line.type == "step" and line.step == step and not done:
                done.append(step)
                act()

        self.monkeypatch.setattr(pipeline.Journal, "hear", hear)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with running_stack(lease_seconds=20) as made:  # none of these waits for it to run out
        for name, value in made.environment.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def desk(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(stack)
    made.monkeypatch = monkeypatch
    return made


def scores(stack: Stack, assistant_id: str, number: int) -> dict[str, tuple[float, int]]:
    """Skill -> (score, items) as stored for the version."""
    from registry import versions

    with stack.sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, assistant_id)
        rows = measurements.list_measurements(session, versions.get_version(session, assistant, number))
        return {row.suite: (row.score, row.n) for row in rows if row.kind == "skill"}


def held_out(stack: Stack, assistant_id: str, skill: str) -> int:
    from registry import demonstrations

    with stack.sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, assistant_id)
        return len(demonstrations.holdout_items(session, assistants.get_skill(session, assistant, skill)))


def test_what_only_reads_takes_no_write_lock(stack: Stack, desk: Desk) -> None:
    """On SQLite such a transaction would hold up every POST, for as long as reading demonstrations takes."""
    mine: list[str] = []
    idle: list[list[str]] = []

    def keep(_connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if threading.current_thread() is threading.main_thread():  # the stand-in controller has its own
            if statement.startswith("BEGIN"):
                mine.clear()
            mine.append(statement)

    def end(_connection: Connection) -> None:
        wrote = any(one.startswith(("INSERT", "UPDATE", "DELETE")) for one in mine)
        if threading.current_thread() is threading.main_thread() and mine[0] == "BEGIN IMMEDIATE":
            idle.extend([] if wrote else [list(mine)])

    update_id = stack.teach(stack.assistant(), "route")
    event.listen(stack.db, "before_cursor_execute", keep)
    event.listen(stack.db, "commit", end)
    try:
        desk.pipeline.run(update_id)
    finally:
        event.remove(stack.db, "before_cursor_execute", keep)
        event.remove(stack.db, "commit", end)
    assert stack.update(update_id).status == "succeeded"
    # Before files are staged the fence is looked at, and the next version's number.
    (fence,) = idle
    assert len(fence) == 3, fence


def test_two_skills_in_a_row(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    began = time.monotonic()
    first = desk.run(stack.teach(assistant, "route"))
    seconds = time.monotonic() - began
    assert (first.status, first.verdict["outcome"], first.error) == ("succeeded", "pass", None)
    assert stack.champion(assistant) == 1
    events = stack.events(first.id)
    phases = [event.message for event in events if event.type == "phase"]
    assert phases == ["preflight", "training", "evaluating", "gating", "publishing", "serving"]
    steps = [event.data for event in events if event.type == "metrics"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [round(step["eta_seconds"], 2) for step in steps] == [0.06, 0.04, 0.02, 0.0]
    (swap,) = [event.data["swap_seconds"] for event in events if "swap_seconds" in event.data]
    assert 0 <= swap < seconds
    (stages,) = [event.data["stage_seconds"] for event in events if "stage_seconds" in event.data]
    assert list(stages) == phases

    n_route = held_out(stack, assistant, "route")
    assert n_route > 5
    assert scores(stack, assistant, 0) == {"route": (0.0, n_route)}
    assert scores(stack, assistant, 1) == {"route": (1.0, n_route)}

    stack.engine.chats.clear()
    second = desk.run(stack.teach(assistant, "refund"))
    assert second.verdict["outcome"] == "pass"
    assert stack.champion(assistant) == 2
    n_refund = held_out(stack, assistant, "refund")
    # The base was measured on the new skill too, the parent on both.
    assert scores(stack, assistant, 0) == {"route": (0.0, n_route), "refund": (0.0, n_refund)}
    assert scores(stack, assistant, 1) == {"route": (1.0, n_route), "refund": (0.0, n_refund)}
    assert scores(stack, assistant, 2) == {"route": (1.0, n_route), "refund": (1.0, n_refund)}
    asked_parent = [
        p for model, p in stack.engine.chats if model.startswith("parent-") and p.startswith("route")
    ]
    assert asked_parent == []  # known from the first update

    one, two = stack.versions()
    assert (two.parent_id, two.served_name) == (one.id, f"helper-v2-{two.manifest_sha256[:8]}")
    assert stack.artifacts() == sorted([one.id, two.id])
    assert list((stack.home / "work").iterdir()) == []
    assert stack.engine.loaded == {}


def test_a_candidate_that_did_not_learn_is_kept_and_not_served(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    stack.plan(learn=False)
    update = desk.run(stack.teach(assistant, "route"))
    assert (update.status, update.verdict["outcome"]) == ("succeeded", "block")
    assert stack.champion(assistant) == 0
    (version,) = stack.versions()
    assert (version.id, version.verdict["outcome"]) == (update.version_id, "block")


def test_publish_hold_keeps_a_passing_version_back(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    update = desk.run(stack.teach(assistant, "route", publish="hold"))
    assert (update.status, update.verdict["outcome"]) == ("succeeded", "pass")
    assert stack.champion(assistant) == 0
    assert len(stack.versions()) == 1


def test_preflights_warnings_are_events_and_stop_nothing(stack: Stack, desk: Desk) -> None:
    stack.plan(warn="50 demonstrations contradict earlier ones.")
    update = desk.run(stack.teach(stack.assistant(), "route"))
    assert update.status == "succeeded"
    events = stack.events(update.id)
    (report,) = [event for event in events if "findings" in event.data]
    assert report.message == "Preflight: student 0.00, teacher 0.75 on 4 held-out items; 4 steps."
    # An event is read by people: it names some of the fifty.
    assert [place["number"] for place in report.data["findings"][0]["places"]] == list(range(1, 21))
    (warning,) = [event for event in events if event.level == "warning"]
    assert warning.message == "50 demonstrations contradict earlier ones. Keep one."
    assert report.seq + 1 == warning.seq


def test_a_refused_preflight_fails_the_update_with_its_reason(stack: Stack, desk: Desk) -> None:
    stack.plan(refuse="the teacher is no better than the student")
    update = desk.run(stack.teach(stack.assistant(), "route"))
    assert update.status == "failed"
    assert update.error == {
        "code": "teacher_gap_too_small",
        "message": "the teacher is no better than the student",
        "param": "recipe",
    }
    assert stack.versions() == []
    assert desk.pipeline.run(update.id) is None
    assert len(stack.trainers()) == 1  # a finished update is not taken up again


def test_a_crash_fails_the_update_and_keeps_only_the_log(stack: Stack, desk: Desk) -> None:
    stack.plan(crash_at=3)
    update = desk.run(stack.teach(stack.assistant(), "route"))
    assert update.status == "failed"
    assert update.error["code"] == "trainer_crashed"
    assert "the loss is not finite" in update.error["message"]
    assert [path.name for path in (stack.home / "work" / update.id).iterdir()] == ["trainer.log"]


def test_a_trainer_killed_again_and_again_ends_the_update(stack: Stack, desk: Desk) -> None:
    """As the kernel does when memory runs out; what a checkpoint gained forgives what was before."""
    update_id = stack.teach(stack.assistant(), "route")
    stack.plan(steps=4, checkpoint_every=2, kill_self_at=4)
    update = desk.run(update_id)
    assert (update.status, update.setbacks, update.error) == ("queued", 1, None)
    update = desk.run_until_finished(update_id)
    assert (update.status, update.error["code"]) == ("failed", "trainer_killed")
    assert update.error["message"].endswith("(Tried 3 times.)")
    # Begun from nothing, then from the checkpoint of step 2, which each time is as far as it gets.
    assert stack.steps(update_id) == [1, 2, 3, 3, 3]
    assert update.setbacks == 3


def test_a_full_disk_is_waited_out(stack: Stack, desk: Desk) -> None:
    stack.plan(steps=6, checkpoint_every=2, disk_full_at=5)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    update = desk.run(update_id)
    assert (update.status, update.setbacks, stack.champion(assistant)) == ("queued", 1, 0)
    (warning,) = [event for event in stack.events(update_id) if event.level == "warning"]
    assert warning.data["error"]["code"] == "disk_full"
    assert list((stack.home / "work" / update_id).glob("output-*")) == []
    stack.plan(steps=6, checkpoint_every=2)  # somebody freed space
    assert desk.run_until_finished(update_id).status == "succeeded"
    assert stack.steps(update_id) == [1, 2, 3, 4, 5, 6]
    assert stack.champion(assistant) == 1


def test_a_disk_that_fills_while_publishing_costs_no_training(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    failpoint.arm(f"worker.staged full {stack.home / 'marker'}")
    try:
        update = desk.run(update_id)
    finally:
        failpoint.arm(None)
    assert (update.status, update.setbacks, stack.champion(assistant)) == ("queued", 1, 0)
    asked = len(stack.engine.chats)
    assert desk.run_until_finished(update_id).status == "succeeded"
    assert (len(stack.trainers()), stack.champion(assistant)) == (1, 1)
    # Everything was measured before: parent and base are in the ledger, the candidate in its work folder.
    assert len(stack.engine.chats) == asked


def test_cancel_while_training(stack: Stack, desk: Desk) -> None:
    stack.plan(steps=LONG, step_seconds=0.1)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")

    def cancel() -> None:
        with stack.sessions.begin() as session:
            updates.request_cancel(session, updates.get_update(session, TEAM, update_id), "user")

    desk.during_step(2, update_id, cancel)
    assert desk.run(update_id).status == "cancelled"
    assert stack.champion(assistant) == 0
    assert stack.versions() == []
    assert stack.artifacts() == []
    assert list((stack.home / "work").iterdir()) == []
    assert len(stack.steps(update_id)) < LONG


def test_cancel_while_measuring(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")

    def cancel(model: str) -> None:
        if model.startswith("cand-"):
            stack.engine.on_chat = lambda model: None
            with stack.sessions.begin() as session:
                updates.request_cancel(session, updates.get_update(session, TEAM, update_id), "user")

    stack.engine.on_chat = cancel
    update = desk.run(update_id)
    assert (update.status, update.version_id) == ("cancelled", None)
    assert stack.champion(assistant) == 0
    assert stack.artifacts() == []
    assert stack.engine.loaded == {}


@pytest.mark.parametrize("moment", ["worker.gating", "worker.allocated", "worker.files_published"])
def test_cancel_that_only_the_ledger_knows(stack: Stack, desk: Desk, moment: str) -> None:
    """No heartbeat told the worker; the ledger refuses the version and its files go."""
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")

    def pass_by(name: str) -> None:
        if name == moment:
            with stack.sessions.begin() as session:
                updates.request_cancel(session, updates.get_update(session, TEAM, update_id), "user")

    desk.monkeypatch.setattr(pipeline, "failpoint", pass_by)
    desk.monkeypatch.setattr(pipeline.Lease, "_renew", lambda lease: None)
    update = desk.run(update_id)
    assert (update.status, update.version_id, update.error) == ("cancelled", None, None)
    assert stack.artifacts() == []
    assert list((stack.home / "work").iterdir()) == []
    assert "failed" not in " ".join(event.message for event in stack.events(update_id))


def test_pause_keeps_a_checkpoint_and_resume_goes_on_from_it(stack: Stack, desk: Desk) -> None:
    stack.plan(steps=LONG, step_seconds=0.1, checkpoint_every=LONG)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")

    def pause() -> None:
        with stack.sessions.begin() as session:
            updates.request_pause(session, updates.get_update(session, TEAM, update_id), "user")

    desk.during_step(2, update_id, pause)
    assert desk.run(update_id).status == "paused"
    before = stack.steps(update_id)
    assert desk.run(update_id).status == "paused"  # a nudge does not wake it
    with stack.sessions.begin() as session:
        updates.resume(session, updates.get_update(session, TEAM, update_id), "user")
    stack.plan(steps=len(before) + 5)
    assert desk.run(update_id).status == "succeeded"
    assert stack.steps(update_id) == list(range(1, len(before) + 6))
    assert 2 <= len(before) < LONG
    assert stack.champion(assistant) == 1


def test_checkpoints_of_an_update_cancelled_while_paused_are_removed(stack: Stack, desk: Desk) -> None:
    """No worker ends such an update; the next one to come by tidies up."""
    stack.plan(steps=LONG, step_seconds=0.1)
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    desk.during_step(2, update_id, lambda: setattr(desk, "shutdown", True))
    assert desk.run(update_id).status == "queued"
    assert (stack.home / "work" / update_id / "checkpoints").is_dir()
    with stack.sessions.begin() as session:
        updates.request_cancel(session, updates.get_update(session, TEAM, update_id), "user")
    assert desk.run(update_id).status == "cancelled"
    assert list((stack.home / "work").iterdir()) == []


def test_a_stale_fence_publishes_nothing(stack: Stack, desk: Desk) -> None:
    """The lease is taken over while this worker stands still between measuring and publishing."""
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    decide = pipeline.decide

    def decide_too_late(*arguments):  # type: ignore[no-untyped-def]
        stack.execute(f"UPDATE updates SET fence = fence + 1 WHERE id = '{update_id}'")
        return decide(*arguments)

    desk.monkeypatch.setattr(pipeline, "decide", decide_too_late)
    update = desk.run(update_id)
    assert (update.status, update.version_id, update.verdict) == ("running", None, None)
    assert stack.versions() == []
    assert stack.champion(assistant) == 0
    assert stack.artifacts() == []
    assert (stack.home / "work" / update_id / "candidate").is_dir()  # its successor's by now

    desk.monkeypatch.undo()
    stack.execute(f"UPDATE updates SET lease_until = 0 WHERE id = '{update_id}'")


def test_an_engine_that_dies_while_measuring_is_waited_for(stack: Stack, desk: Desk) -> None:
    """It comes back on another port without its adapters."""
    from registry import serving
    from tests.worker_stack.engine import StandInEngine

    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    asked = []

    def die(model: str) -> None:
        if not model.startswith("cand-"):
            return
        asked.append(model)
        if len(asked) == 3:
            dead, stack.engine = stack.engine, StandInEngine("base")
            with stack.sessions.begin() as session:
                serving.remove_replica(session, dead.url)
                serving.register_replica(session, stack.engine.url, str(stack.base), "base")
            dead.die()

    stack.engine.on_chat = die
    desk.monkeypatch.setattr(patient_engine, "RETRY_SECONDS", 0.05)
    update = desk.run(update_id)
    assert (update.status, update.verdict["outcome"]) == ("succeeded", "pass")
    assert scores(stack, assistant, 1) == {"route": (1.0, held_out(stack, assistant, "route"))}
    assert stack.steps(update_id) == [1, 2, 3, 4]
    (warning,) = [event.message for event in stack.events(update_id) if event.level == "warning"]
    assert warning.startswith("Waiting for the inference engine")
    assert set(stack.engine.ever_loaded) == {f"cand-{update_id}-1"}
    assert stack.engine.loaded == {}


def test_a_version_that_does_not_come_to_serve_is_a_warning(stack: Stack, desk: Desk) -> None:
    assistant = stack.assistant()
    update_id = stack.teach(assistant, "route")
    stack.stop_serving()
    desk.monkeypatch.setattr(pipeline, "SERVING_PATIENCE_SECONDS", 0.5)
    assert desk.run(update_id).status == "succeeded"
    assert stack.champion(assistant) == 1
    (warning,) = [event for event in stack.events(update_id) if event.level == "warning"]
    assert warning.message.startswith("Published, but not serving after")


def test_demonstrations_that_arrive_in_between_do_not_change_the_job(stack: Stack, desk: Desk) -> None:
    from domain.demonstration import DemonstrationLine
    from registry import demonstrations

    stack.plan(steps=LONG, step_seconds=0.1)
    assistant_id = stack.assistant()
    update_id = stack.teach(assistant_id, "route")
    desk.during_step(2, update_id, lambda: setattr(desk, "shutdown", True))
    assert desk.run(update_id).status == "queued"
    job_file = stack.home / "work" / update_id / "job.json"
    before = json.loads(job_file.read_text())
    with stack.sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, assistant_id)
        skill = assistants.get_skill(session, assistant, "route")
        batch = [
            DemonstrationLine(prompt=f"late {n}?", response="LATE").to_demonstration() for n in range(20)
        ]
        demonstrations.accept_batch(session, assistant, skill, batch, actor="user")
    further = len(stack.steps(update_id)) + 2
    desk.during_step(further, update_id, lambda: setattr(desk, "shutdown", True))
    desk.shutdown = False
    assert desk.run(update_id).status == "queued"
    after = json.loads(job_file.read_text())
    assert after["skills"] == before["skills"]
    assert after["output_dir"] != before["output_dir"]
