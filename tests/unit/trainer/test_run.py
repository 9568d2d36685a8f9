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
    HoldoutLine,
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


@pytest.mark.parametrize("method", ["sdft", "sft", "dft", "cpt"])
def test_demonstration_tokens_become_likelier(job: TrainingJob, method: str) -> None:
    """Purely off-policy on one answer, the loss falls: the gradient has the right sign and scale."""
    job = with_recipe(
        job, method=method, off_policy_share=1.0, rehearsal_share=0.0, num_epochs=30, warmup_steps=0,
        learning_rate=2e-2, teacher="parent",
    )  # fmt: skip
    losses = [line.loss for line in steps(run(job))]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_a_fixed_set_of_teacher_answers_is_drawn_once_and_learnt(job: TrainingJob, tmp_path: Path) -> None:
    """The teacher's answers stand in the checkpoint, so that a resumed run learns the same ones."""
    changes = dict(
        method="offline_distillation", rehearsal_share=0.0, num_epochs=30, warmup_steps=0, learning_rate=2e-2,
        teacher="parent", max_new_tokens=200, temperature=3.0,
    )  # fmt: skip
    job = with_recipe(job, **changes)
    cut = elsewhere(job, tmp_path / "cut")
    with pytest.raises(Interrupted):
        run(cut, 3)
    (newest, *_) = sorted((tmp_path / "cut" / "ck").glob("step-*"), reverse=True)
    targets = json.loads((newest / "state.json").read_text())["targets"]
    assert len(targets) == 8
    run(cut)
    losses = [line.loss for line in steps(run(job))]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    expected = adapter(job)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(cut).items())


@pytest.mark.parametrize("changes", [
    {"teacher": "live"},
    {"divergence": "jsd", "jsd_beta": 0.3},
    {"divergence": "reverse", "divergence_top_k": 10},
    {"importance_clip": 2.0, "rollout_every": 2},
    {"rollouts_per_prompt": 3, "top_p": 0.9},
    {"method": "offline_distillation", "offline_targets": "distribution", "teacher": "parent"},
    {"num_context_demonstrations": 2, "demonstration_selection": "nearest"},
])  # fmt: skip
def test_every_choice_resumes_exactly(job: TrainingJob, tmp_path: Path, changes: dict[str, object]) -> None:
    job = with_recipe(job, **changes)
    cut = elsewhere(job, tmp_path / "cut")
    with pytest.raises(Interrupted):
        run(cut, 3)
    run(cut)
    run(job)
    expected = adapter(job)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(cut).items())
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)


def test_reinvoking_ends_with_rehearsal_alone(job: TrainingJob) -> None:
    job = with_recipe(job, method="sft_reinvoke", reinvoke_steps=3, rehearsal_share=0.0, num_epochs=1)
    lines = steps(run(job))
    assert [line.teacher_kl is None for line in lines] == [False, False, True, True, True]
    assert [line.rehearsal_kl is None for line in lines] == [True, True, False, False, False]


def test_reinvoking_without_prompts_is_refused(job: TrainingJob, tmp_path: Path) -> None:
    job = with_recipe(job, method="sft_reinvoke", reinvoke_steps=3)
    with pytest.raises(TrainingRefused) as refused:
        run(elsewhere(job, tmp_path / "other", rehearsal=[]))
    assert (refused.value.code, refused.value.param) == ("no_rehearsal_prompts", "recipe.reinvoke_steps")


def test_early_stop_keeps_the_weights_of_the_first_best_score(job: TrainingJob, tmp_path: Path) -> None:
    """A random model scores 0 throughout: the score of step 2 stays the best, two more end the run at 6,
    and what is written are the weights after 2 steps."""
    stopping = with_recipe(job, early_stop_every=2, early_stop_patience=2)
    cut = elsewhere(stopping, tmp_path / "cut")
    with pytest.raises(Interrupted):
        run(cut, 5)
    lines = run(stopping)
    scores = [line for line in lines if isinstance(line, HoldoutLine)]
    assert [(line.step, line.best_step, line.score) for line in scores] == [(2, 2, 0), (4, 2, 0), (6, 2, 0)]
    assert steps(lines)[-1].step == 6
    assert [line.step for line in steps(run(cut))] == [6]
    two = elsewhere(with_recipe(job, checkpoint_every=2), tmp_path / "two")
    with pytest.raises(Interrupted):
        run(two, 2)
    expected = load_file(tmp_path / "two" / "ck" / "step-000002" / "tensors.safetensors")
    for written in (adapter(stopping), adapter(cut)):
        for name, tensor in written.items():
            inner = name.removeprefix("base_model.model.").removesuffix(".weight")
            assert torch.equal(tensor, expected[f"student/{inner}"])


def test_the_last_weights_are_scored_too(job: TrainingJob) -> None:
    """8 steps: 8 lessons in 3 epochs at 3 a step."""
    scores = [line for line in run(with_recipe(job, early_stop_every=5)) if isinstance(line, HoldoutLine)]
    assert [line.step for line in scores] == [5, 8]


def test_kl_to_the_base_is_measured_on_own_samples(job: TrainingJob) -> None:
    """Zero at first, when the student is the base; then above zero, and only every third step."""
    job = with_recipe(job, kl_to_base_every=3, off_policy_share=1.0, num_epochs=2, learning_rate=2e-2)
    found = [line.base_kl for line in steps(run(job))]
    assert [value is not None for value in found] == [True, False, False, True, False, False]
    assert found[0] == pytest.approx(0.0, abs=2e-3)
    assert found[3] is not None
    assert found[3] > 0.01


def test_flops_by_hand(job: TrainingJob) -> None:
    """One sequence of cross-entropy: 2 x 2 per trunk parameter and padded token, 6 per head entry and
    response token. Trunk: 2 layers of q, o 32x32, k, v 32x16, three MLP matrices 32x64; head 258 x 32."""
    job = with_recipe(job, method="sft", batch_size=1, rehearsal_share=0.0, max_steps=1)
    (line,) = steps(run(job))
    trunk = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    response = 4
    assert line.flops == 2 * 2 * trunk * (line.tokens - 1) + 2 * 3 * response * 258 * 32


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
