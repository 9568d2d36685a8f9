"""How much a schedule has to compute, in tokens: what a measured step is extrapolated by."""

from collections.abc import Iterable
from dataclasses import dataclass

from domain.preflight import PreflightReport
from domain.recipe import Recipe
from trainer.material import Material
from trainer.methods import plan_of


@dataclass(frozen=True)
class AnswerLengths:
    """Mean tokens of what is sampled."""

    student: float
    teacher: float
    rehearsed: float

    @property
    def on_policy(self) -> float:
        """A student's answers begin as its own and end as the teacher's: the mean over the training."""
        return (self.student + self.teacher) / 2


def expected_lengths(report: PreflightReport, recipe: Recipe) -> AnswerLengths:
    """As measured on held-out items; where nothing was, and on rehearsal prompts, the most there can be."""
    student = recipe.max_new_tokens if report.student_tokens is None else report.student_tokens
    teacher = student if report.teacher_tokens is None else report.teacher_tokens
    return AnswerLengths(student, teacher, recipe.max_rehearsal_tokens)


@dataclass(frozen=True)
class Work:
    """Tokens that student and teacher read, without what packing saves."""

    student: float
    teacher: float
    sampling_steps: int
    """Steps that need answers to be sampled."""


def work_of(material: Material, recipe: Recipe, steps: Iterable[int], answers: AnswerLengths) -> Work:
    """The work of 0-based `steps` from the first one on. A frozen teacher reads a demonstration's own
    tokens once in all."""
    plan = plan_of(recipe)
    frozen = recipe.teacher in ("parent", "base")
    lessons, rehearsal = material.lessons, material.rehearsal
    student, teacher, sampling, read = 0.0, 0.0, 0, set[int]()
    for step in steps:
        batch = material.schedule.batch(step)
        for index in batch.on_policy:
            student += len(lessons[index].prompt) + answers.on_policy
            teacher += len(lessons[index].teacher_prompt) + answers.on_policy
        for index in batch.off_policy:
            own = answers.teacher if plan.responses == "teacher" else len(lessons[index].response)
            student += len(lessons[index].prompt) + own
            if plan.loss == "divergence" and not (frozen and index in read):
                teacher += len(lessons[index].teacher_prompt) + own
                read.add(index)
        for index in batch.rehearsal:
            student += len(rehearsal[index]) + answers.rehearsed
            teacher += len(rehearsal[index]) + answers.rehearsed
        sampling += bool(batch.on_policy or batch.rehearsal)
    return Work(student, teacher, sampling)


def decoding_steps(report: PreflightReport, recipe: Recipe, limit: int) -> float:
    """Tokens decoded one after another in a round of samples: as many as its longest answer has, none above
    `limit`. Answers may become shorter in training; that is not counted on."""
    rehearses = recipe.rehearsal_share > 0 or recipe.reinvoke_steps > 0
    longest = float(min(recipe.max_rehearsal_tokens, limit)) if rehearses else 0.0
    if plan_of(recipe).responses == "student" and recipe.off_policy_share < 1:
        own = _longest(report.student_tokens, report.student_truncated, recipe)
        taught = _longest(report.teacher_tokens, report.teacher_truncated, recipe)
        longest = max(longest, min(max(own, taught), limit))
    return longest


def _longest(mean: float | None, truncated: float | None, recipe: Recipe) -> float:
    """Of many answers one is about twice as long as the mean; where some are cut, one will be cut."""
    if mean is None or truncated:
        return recipe.max_new_tokens
    return min(recipe.max_new_tokens, 2 * mean)
