"""The whole loop on a tiny model: resume, refusals, gap, what is written, the process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from domain.errors import TrainingRefused
from domain.training import (
    TRAINER_LINE,
    CheckpointLine,
    DoneLine,
    PreflightLine,
    StepLine,
    TrainerLine,
    TrainingJob,
)
from trainer.run import Interrupted, train


def run(job: TrainingJob, stop_after: int | None = None) -> list[TrainerLine]:
    lines: list[TrainerLine] = []

    def stop() -> bool:
        return stop_after is not None and sum(isinstance(line, StepLine) for line in lines) >= stop_after

    train(job, lines.append, stop)
    return lines


def elsewhere(job: TrainingJob, folder: Path, **changes: object) -> TrainingJob:
    return job.model_copy(
        update={"checkpoint_dir": str(folder / "ck"), "output_dir": str(folder / "out"), **changes}
    )


def with_recipe(job: TrainingJob, **changes: object) -> TrainingJob:
    return job.model_copy(update={"recipe": job.recipe.model_copy(update=changes)})


def adapter(job: TrainingJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output_dir) / "adapter_model.safetensors")


def steps(lines: list[TrainerLine]) -> list[StepLine]:
    return [line for line in lines if isinstance(line, StepLine)]


@pytest.mark.parametrize("teacher", ["ema", "parent"])
@pytest.mark.parametrize("stop_after", [3, 4])
def test_interrupted_equals_uninterrupted(
    job: TrainingJob, tmp_path: Path, teacher: str, stop_after: int
) -> None:
    """Stopped inside a rollout round (3) and at a checkpoint (4); 8 steps of 3 lessons are 3 epochs of 8."""
    job = with_recipe(job, teacher=teacher)
    whole = run(job)
    cut = elsewhere(job, tmp_path / "cut")
    with pytest.raises(Interrupted):
        run(cut, stop_after)
    rest = run(cut)
    assert CheckpointLine(step=stop_after, resumed=True) in rest
    assert [line.step for line in steps(rest)] == list(range(stop_after + 1, 9))
    assert [line.loss for line in steps(rest)] == [line.loss for line in steps(whole)][stop_after:]
    expected = adapter(job)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(cut).items())
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)


def test_lines_in_order_and_shares(job: TrainingJob) -> None:
    lines = run(job)
    assert isinstance(lines[0], PreflightLine)
    assert isinstance(lines[-1], DoneLine)
    assert lines[0].steps == lines[-1].steps == 8
    assert lines[0].items == 2
    assert [line.step for line in steps(lines)] == list(range(1, 9))
    assert steps(lines)[-1].eta_seconds == 0
    assert [line.step for line in lines if isinstance(line, CheckpointLine)] == [2, 4, 6, 8]


def test_rehearsal_kl_is_zero_on_the_first_step_and_absent_without_prompts(
    job: TrainingJob, tmp_path: Path
) -> None:
    """The first student is the parent, and rehearsal's teacher is the parent without demonstration."""
    first = steps(run(job))[0]
    # Not exactly zero: student and teacher run in differently shaped batches of bfloat16.
    assert first.rehearsal_kl == pytest.approx(0.0, abs=2e-3)
    assert first.teacher_kl > 0.05
    without = steps(run(elsewhere(job, tmp_path / "other", rehearsal=[])))
    assert all(line.rehearsal_kl is None for line in without)


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_demonstration_tokens_become_likelier(job: TrainingJob, method: str) -> None:
    """Purely off-policy on one answer, the loss falls: the gradient has the right sign and scale."""
    job = with_recipe(
        job, method=method, off_policy_share=1.0, rehearsal_share=0.0, num_epochs=30, warmup_steps=0,
        learning_rate=2e-2, teacher="parent",
    )  # fmt: skip
    losses = [line.loss for line in steps(run(job))]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_small_gap_is_refused(job: TrainingJob) -> None:
    """A random teacher answers nothing right: gap 0 is below 0.02."""
    with pytest.raises(TrainingRefused) as refused:
        run(with_recipe(job, on_small_gap="refuse"))
    assert refused.value.code == "teacher_gap_too_small"
    assert not Path(job.output_dir).exists()


def test_second_update_continues_the_parent(job: TrainingJob, tmp_path: Path) -> None:
    run(job)
    second = elsewhere(job, tmp_path / "second", parent_adapter_path=job.output_dir)
    # A rate of almost nothing leaves what the update started from: the parent.
    run(with_recipe(second, learning_rate=1e-12, max_steps=1))
    parent = adapter(job)
    for name, tensor in adapter(second).items():
        torch.testing.assert_close(tensor, parent[name], rtol=0, atol=1e-6)


@pytest.fixture
def start(job: TrainingJob, tmp_path: Path) -> Callable[[TrainingJob], "subprocess.Popen[bytes]"]:
    def launch(job: TrainingJob) -> "subprocess.Popen[bytes]":
        path = tmp_path / "job.json"
        path.write_text(job.model_dump_json())
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return launch


def test_process_refuses_with_a_line_and_status_65(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[bytes]"]
) -> None:
    process = start(with_recipe(job, on_small_gap="refuse"))
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait() == 65
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["code"]) == ("refused", "teacher_gap_too_small")


def test_process_stops_on_sigterm_with_a_checkpoint(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[bytes]"]
) -> None:
    process = start(with_recipe(job, num_epochs=100, checkpoint_every=1000))
    assert process.stdout is not None
    seen: list[TrainerLine] = []
    for raw in process.stdout:
        seen.append(TRAINER_LINE.validate_json(raw))
        if isinstance(seen[-1], StepLine):
            break
    process.send_signal(signal.SIGTERM)
    rest = [TRAINER_LINE.validate_json(raw) for raw in process.stdout]
    assert process.wait() == 75
    assert isinstance(rest[-1], CheckpointLine)
    assert (Path(job.checkpoint_dir) / f"step-{rest[-1].step:06d}").is_dir()


def test_process_exits_when_its_standard_input_closes(
    job: TrainingJob, start: Callable[[TrainingJob], "subprocess.Popen[bytes]"]
) -> None:
    process = start(with_recipe(job, num_epochs=100))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=60) == 75
    process.stdout.close()
