"""The expected cost: tokens by hand, memory against the operating system's own figures."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from domain.preflight import Cost, PreflightReport
from domain.recipe import Recipe
from domain.training import TrainingJob
from tests.unit.trainer.builders import demonstration
from trainer.dry_run import preflight
from trainer.loading import load_model
from trainer.material import Material
from trainer.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from trainer.model import compute_dtype
from trainer.preflight_cost import memory_findings
from trainer.preflight_work import AnswerLengths, Work, decoding_steps, expected_lengths, work_of
from trainer.rollout import OwnRollouts

CPU = torch.device("cpu")


def material(job: TrainingJob, **changes: object) -> tuple[Material, Recipe]:
    """Two lessons of two-letter prompts, two of them a step, for three steps."""
    skill = job.skills[0].model_copy(update={"train": [demonstration("q1", "A"), demonstration("q2", "BBB")]})
    two = {"batch_size": 2, "num_epochs": 3, "rehearsal_share": 0.0, "num_context_demonstrations": 0}
    recipe = job.recipe.model_copy(update=two | changes)
    job = job.model_copy(update={"skills": [skill], "recipe": recipe})
    model = load_model(Path(job.base_path), recipe, None)
    return Material(job, model, OwnRollouts(model)), recipe


def work(job: TrainingJob, answers: AnswerLengths, **changes: object) -> Work:
    made, recipe = material(job, **changes)
    assert made.schedule.steps == 3
    return work_of(made, recipe, range(3), answers)


PROMPT = 1 + 7 + 1 + 1 + 10
"""<s> "user:q1" </s> <s> "assistant:"."""
SHOWN = PROMPT + 1
"""The same as an earlier turn, with </s> after an answer that is counted apart."""
ANSWERS = AnswerLengths(student=6, teacher=4, rehearsed=5)


def test_a_frozen_teacher_reads_demonstration_tokens_once(job: TrainingJob) -> None:
    """Responses are 2 and 4 tokens with their </s>, their answers 1 and 3 in the teacher's turn."""
    student = 3 * (2 * PROMPT + 2 + 4)
    teacher = 2 * PROMPT + 2 * SHOWN + 1 + 3 + 2 + 4
    frozen = work(job, ANSWERS, off_policy_share=1.0, teacher="parent")
    assert frozen == Work(student, teacher, sampling_steps=0)
    assert work(job, ANSWERS, off_policy_share=1.0, teacher="ema") == Work(
        student, 3 * teacher, sampling_steps=0
    )
    assert work(job, ANSWERS, method="sft") == Work(student, 0, sampling_steps=0)


def test_samples_have_the_mean_of_both_lengths_and_every_rollout_counts(job: TrainingJob) -> None:
    """(6 + 4) / 2 tokens an answer, two answers a prompt."""
    student = 3 * 2 * (2 * PROMPT + 2 * 5)
    teacher = 3 * 2 * (2 * PROMPT + 2 * SHOWN + 1 + 3 + 2 * 5)
    made = work(job, ANSWERS, off_policy_share=0.0, rollouts_per_prompt=2)
    assert made == Work(student, teacher, sampling_steps=3)


def test_rehearsal_is_read_by_both_without_a_demonstration(job: TrainingJob) -> None:
    """A batch of four is three lessons and one rehearsal prompt: "hello", "what is this?" and "bye" in
    three steps of an epoch, 5 + 13 + 3 letters on 18 tokens of template, 5 more sampled."""
    rehearsed = 3 * 18 + 21 + 3 * 5
    changes = {"batch_size": 4, "rehearsal_share": 0.25, "off_policy_share": 1.0, "max_steps": 3}
    with_it, recipe = material(job, **changes, min_steps=3, teacher="parent")
    assert with_it.schedule.steps == 3
    both = work_of(with_it, recipe, range(3), ANSWERS)
    lessons = [
        len(with_it.lessons[i].prompt) + len(with_it.lessons[i].response)
        for step in range(3)
        for i in with_it.schedule.batch(step).off_policy
    ]
    assert both.student == sum(lessons) + rehearsed
    assert both.teacher == 2 * PROMPT + 2 * SHOWN + 1 + 3 + 2 + 4 + rehearsed
    assert both.sampling_steps == 3


def report(**changes: object) -> PreflightReport:
    fields: dict[str, object] = {
        "items": 0, "student_score": None, "teacher_score": None, "gap": None,
        "longest_prompt_tokens": 1, "steps": 3,
    }  # fmt: skip
    return PreflightReport.model_validate(fields | changes)


def test_decoding_is_as_long_as_the_longest_answer() -> None:
    recipe = Recipe(max_new_tokens=100, max_rehearsal_tokens=24, rehearsal_share=0.25)
    measured = report(student_tokens=40.0, student_truncated=0.1, teacher_tokens=8.0, teacher_truncated=0.0)
    # One of the student's answers is cut at 100; where none is, the longest is about 2 * 40.
    assert decoding_steps(measured, recipe, 100) == 100
    assert decoding_steps(measured, recipe, 32) == 32
    assert decoding_steps(measured.model_copy(update={"student_truncated": 0.0}), recipe, 100) == 80
    assert decoding_steps(report(), recipe, 100) == 100
    # Supervised, only rehearsal is sampled, and without it nothing.
    supervised = recipe.model_copy(update={"method": "sft"})
    assert decoding_steps(measured, supervised, 100) == 24
    assert decoding_steps(measured, supervised.model_copy(update={"rehearsal_share": 0.0}), 100) == 0


def test_lengths_that_were_not_measured_are_the_most_there_can_be() -> None:
    recipe = Recipe(max_new_tokens=100, max_rehearsal_tokens=24)
    assert expected_lengths(report(), recipe) == AnswerLengths(100, 100, 24)
    assert expected_lengths(report(student_tokens=9.0), recipe) == AnswerLengths(9, 9, 24)
    measured = report(student_tokens=9.0, teacher_tokens=5.0)
    assert expected_lengths(measured, recipe).on_policy == 7.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "sft"},
        {"method": "offline_distillation", "teacher": "parent"},
        {"teacher": "parent", "rollout_every": 1, "rollouts_per_prompt": 2},
        {"lora_rank": 0},
        {"method": "sft_reinvoke", "reinvoke_steps": 3, "rehearsal_share": 0.0},
    ],
)
def test_every_way_of_training_is_probed_whole(job: TrainingJob, changes: dict[str, object]) -> None:
    job = job.model_copy(update={"recipe": job.recipe.model_copy(update=changes)})
    found = preflight(job)
    assert found.errors == []
    cost = found.cost
    assert cost is not None
    assert cost.student_seconds > 0
    assert cost.rollout_seconds > 0  # at least of rehearsal
    assert cost.seconds == pytest.approx(cost.rollout_seconds + cost.teacher_seconds + cost.student_seconds)
    assert cost.device == "cpu"
    assert cost.parameter_bytes < cost.peak_bytes < cost.available_bytes
    assert not Path(job.output_dir).exists()
    assert not Path(job.checkpoint_dir).exists()


def test_weights_in_memory_are_the_base_and_an_adapter_for_each_role(job: TrainingJob) -> None:
    model = load_model(Path(job.base_path), job.recipe, None)
    model.save_student(Path(job.output_dir), "tiny")
    base = sum(tensor.numel() for tensor in load_file(Path(job.base_path) / "model.safetensors").values())
    adapter = sum(
        tensor.numel() for tensor in load_file(Path(job.output_dir) / "adapter_model.safetensors").values()
    )
    # `ema` is the recipe's teacher; without a parent's adapter the parent is the base.
    assert model.weight_bytes() == base * compute_dtype().itemsize + 2 * 4 * adapter


def test_the_peak_is_the_operating_systems() -> None:
    reset_peak(CPU)
    before = used_bytes(CPU)
    # Pages of its own: the allocator may answer from memory that earlier tests freed.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        held = used_bytes(CPU)
    assert held - before == pytest.approx(64 * 2**20, rel=0.2)
    assert peak_bytes(CPU) >= held - 2**20
    assert used_bytes(CPU) <= held
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert held < available_bytes(CPU) <= int(total.split()[1]) * 1024


def test_what_does_not_fit_is_a_warning() -> None:
    cost = Cost(
        seconds=1, rollout_seconds=0, teacher_seconds=0, student_seconds=1, probe_seconds=1,
        parameter_bytes=1, peak_bytes=3_000_000_000, available_bytes=2_000_000_000, device="cpu",
    )  # fmt: skip
    (finding,) = memory_findings(cost)
    assert (finding.code, finding.severity) == ("not_enough_memory", "warning")
    assert "need 3.00 GB on cpu, where 2.00 GB can be had" in finding.message
    assert memory_findings(cost.model_copy(update={"peak_bytes": 2_000_000_000})) == []
