"""The trainer process: its lines, its endings, and that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from domain.errors import TrainingFailed, TrainingRefused
from domain.recipe import Recipe
from domain.training import CheckpointLine, DoneLine, PreflightLine, StepLine, TrainerLine, TrainingJob
from worker import trainer_process
from worker.lease import Stop
from worker.setbacks import understand
from worker.trainer_process import Ending, run_trainer

COMMAND = [sys.executable, "-m", "tests.worker_stack.trainer"]


class Bench:
    """A work folder and a plan for the stand-in trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job_file = folder / "job.json"
        base = folder / "base"
        base.mkdir()
        (base / "config.json").write_text(json.dumps({"hidden_size": 4, "num_hidden_layers": 2}))
        self.job_file.write_text(
            TrainingJob(
                update_id="upd_1",
                base_path=str(base),
                base_model="tiny",
                parent_adapter_path=None,
                recipe=Recipe(),
                skills=[],
                checkpoint_dir=str(folder / "checkpoints"),
                output_dir=str(folder / "output"),
            ).model_dump_json()
        )
        self.lines: list[TrainerLine] = []

    def plan(self, **changes: object) -> None:
        plan = {"steps": 4, "step_seconds": 0.02, "checkpoint_every": 2} | changes
        (self.folder / "PLAN.json").write_text(json.dumps(plan))

    def run(
        self,
        stop: Callable[[], Stop | None] = lambda: None,
        on_line: Callable[[TrainerLine], None] | None = None,
        silence_seconds: float = 60,
    ) -> Ending:
        def hear(line: TrainerLine) -> None:
            self.lines.append(line)
            if on_line is not None:
                on_line(line)

        return run_trainer(
            COMMAND, self.job_file, threads=1, silence_seconds=silence_seconds, on_line=hear, stop=stop
        )

    def steps(self) -> list[int]:
        return [line.step for line in self.lines if isinstance(line, StepLine)]

    def alive(self) -> list[int]:
        pids = [int(pid) for pid in (self.folder / "pids").read_text().split()]
        return [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("STANDIN_DIR", str(tmp_path))
    made = Bench(tmp_path)
    made.plan()
    return made


def after(bench: Bench, step: int, reason: Stop) -> Callable[[], Stop | None]:
    """A reason to stop that appears once the step was heard."""
    return lambda: reason if step in bench.steps() else None


def test_lines_come_in_order_and_the_adapter_is_there(bench: Bench) -> None:
    assert bench.run() == Ending.DONE
    kinds = [line.type for line in bench.lines]
    assert kinds == ["preflight", "step", "step", "checkpoint", "step", "step", "checkpoint", "done"]
    assert bench.steps() == [1, 2, 3, 4]
    assert (bench.folder / "output" / "adapter_model.safetensors").is_file()
    assert bench.alive() == []


def test_it_gets_its_own_thread_count_and_process_group(bench: Bench) -> None:
    bench.plan(step_seconds=60)  # it is looked at while it lives
    seen = []

    def look(line: TrainerLine) -> None:
        if isinstance(line, PreflightLine):
            pid = int((bench.folder / "pids").read_text())
            environment = psutil.Process(pid).environ()
            seen.append(
                (os.getpgid(pid) == pid, environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"])
            )

    bench.run(on_line=look, stop=lambda: Stop.CANCEL if seen else None)
    assert seen == [(True, "1", "PASSIVE")]


def test_a_pause_leaves_a_checkpoint_and_the_next_run_goes_on_from_it(bench: Bench) -> None:
    bench.plan(steps=1000, step_seconds=0.2, checkpoint_every=10_000)
    assert bench.run(stop=after(bench, 2, Stop.PAUSE)) == Ending.STOPPED
    assert bench.alive() == []
    stopped_at = bench.steps()[-1]
    assert 2 <= stopped_at < 1000
    bench.lines.clear()
    bench.plan(steps=stopped_at + 4)
    assert bench.run() == Ending.DONE
    assert bench.lines[0] == CheckpointLine(step=stopped_at, resumed=True)
    assert bench.steps() == list(range(stopped_at + 1, stopped_at + 5))


def test_a_rollout_server_that_is_away_may_come_back(bench: Bench) -> None:
    bench.plan(rollout_server_away_at=3)
    with pytest.raises(TrainingFailed, match="did not answer") as failed:
        bench.run()
    failure = understand(failed.value)
    assert (failure.code, failure.may_pass) == ("rollout_server_away", True)
    bench.plan()
    bench.lines.clear()
    assert bench.run() == Ending.DONE
    assert bench.lines[0] == CheckpointLine(step=2, resumed=True)


@pytest.mark.parametrize("reason", [Stop.CANCEL, Stop.LOST])
def test_a_cancel_or_a_lost_lease_kills_at_once(bench: Bench, reason: Stop) -> None:
    bench.plan(steps=3, step_seconds=60, checkpoint_every=1)
    assert bench.run(stop=lambda: reason if bench.lines else None) == Ending.STOPPED
    assert bench.steps() == []
    assert bench.alive() == []


def test_a_trainer_deaf_to_sigterm_is_killed_after_the_grace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_process, "GRACE_SECONDS", 0.5)
    bench.plan(steps=2, step_seconds=60)
    assert bench.run(stop=lambda: Stop.PAUSE if bench.lines else None) == Ending.STOPPED
    assert bench.alive() == []


def test_a_refusal_carries_its_reason(bench: Bench) -> None:
    bench.plan(refuse="the teacher is no better than the student")
    with pytest.raises(TrainingRefused) as refused:
        bench.run()
    assert (refused.value.code, refused.value.message, refused.value.param) == (
        "teacher_gap_too_small",
        "the teacher is no better than the student",
        "recipe",
    )


def test_a_crash_tells_the_end_of_the_log(bench: Bench) -> None:
    bench.plan(crash_at=3)
    with pytest.raises(TrainingFailed, match="RuntimeError: the loss is not finite") as failed:
        bench.run()
    assert failed.value.code == "trainer_crashed"
    assert "status 1" in failed.value.message
    assert bench.steps() == [1, 2]


def test_a_kill_from_outside_is_told_apart_from_a_crash(bench: Bench) -> None:
    bench.plan(kill_self_at=3)
    assert bench.run() == Ending.KILLED


def test_noise_on_standard_output_is_not_fatal(bench: Bench) -> None:
    bench.plan(print_noise=True)
    assert bench.run() == Ending.DONE
    assert isinstance(bench.lines[-1], DoneLine)


def test_status_0_without_done_is_a_failure(bench: Bench) -> None:
    with pytest.raises(TrainingFailed, match="status 0"):
        run_trainer(
            ["true"],
            bench.job_file,
            threads=1,
            silence_seconds=60,
            on_line=bench.lines.append,
            stop=lambda: None,
        )


def test_an_error_in_the_listener_leaves_no_process(bench: Bench) -> None:
    bench.plan(step_seconds=60)

    def fail(line: TrainerLine) -> None:
        raise ConnectionError("the database went away")

    with pytest.raises(ConnectionError):
        bench.run(on_line=fail)
    assert bench.alive() == []


def test_a_newer_claim_kills_the_trainer_of_a_frozen_worker(bench: Bench) -> None:
    """The older one cannot be stopped by its own worker, which does not run."""
    bench.plan(steps=3, step_seconds=60)
    code = (
        "import sys, pathlib\n"
        "from worker.trainer_process import run_trainer\n"
        "run_trainer(sys.argv[2:], pathlib.Path(sys.argv[1]), threads=1, silence_seconds=60, "
        "on_line=lambda line: print(line.type, flush=True), stop=lambda: None)\n"
    )
    older = psutil.Popen([sys.executable, "-c", code, str(bench.job_file), *COMMAND], stdout=-1)
    try:
        assert older.stdout.readline() == b"preflight\n"
        (stale,) = bench.alive()
        older.send_signal(signal.SIGSTOP)
        bench.plan(steps=2)
        assert bench.run() == Ending.DONE
        assert not psutil.pid_exists(stale) or psutil.Process(stale).status() == psutil.STATUS_ZOMBIE
    finally:
        older.kill()
        older.wait()
        older.stdout.close()


@pytest.fixture
def unnamed_holder(bench: Bench) -> Iterator["subprocess.Popen[bytes]"]:
    """Holds the lock as a trainer that has just been started; it ends when its standard input closes."""
    code = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(bench.folder / "trainer.pid")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder


def test_a_trainer_whose_worker_died_before_it_was_noted_is_waited_for(
    bench: Bench, unnamed_holder: "subprocess.Popen[bytes]"
) -> None:
    assert unnamed_holder.stdin is not None
    threading.Timer(1, unnamed_holder.stdin.close).start()
    assert bench.run() == Ending.DONE


def test_a_trainer_that_nobody_can_name_is_a_setback(
    bench: Bench, unnamed_holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_process, "GRACE_SECONDS", 0.5)
    with pytest.raises(TrainingFailed, match="has not ended") as failed:
        bench.run()
    assert understand(failed.value).may_pass
    assert bench.lines == []


def test_a_trainer_that_hangs_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last word is the checkpoint of step 2, and then the clock jumps."""

    def silent_for() -> int:
        return 3001 if any(isinstance(line, CheckpointLine) for line in bench.lines) else 0

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + silent_for(), sleep=time.sleep)
    monkeypatch.setattr(trainer_process, "time", clock)
    bench.plan(steps=9, freeze_at=3)
    with pytest.raises(TrainingFailed, match="said nothing for 3000 s") as raised:
        bench.run(silence_seconds=3000)
    assert raised.value.code == "trainer_silent"
    assert understand(raised.value).may_pass
    assert bench.steps() == [1, 2]
    assert bench.alive() == []
