"""What is checked before a single step: every teacher prompt fits, and the teacher knows more."""

from collections.abc import Sequence
from dataclasses import dataclass

from domain.errors import TrainingRefused
from domain.grading import grade
from domain.recipe import Recipe
from domain.skill import Grader
from trainer.contexts import Lesson
from trainer.model import Model
from trainer.rollout import GREEDY, sample
from trainer.teacher import Teacher

MEASURED_ITEMS = 32
"""Held-out items answered by student and teacher: about ten seconds on two cores."""


@dataclass(frozen=True)
class Gap:
    items: int
    student_score: float
    teacher_score: float

    @property
    def gap(self) -> float:
        return self.teacher_score - self.student_score


def check_lengths(lessons: Sequence[Lesson], recipe: Recipe, window: int) -> int:
    """The longest teacher prompt in tokens.

    Raises TrainingRefused naming the first demonstration whose teacher prompt and answer do not fit: a
    prompt is never truncated.
    """
    longest = 0
    for number, lesson in enumerate(lessons, start=1):
        longest = max(longest, len(lesson.teacher_prompt))
        need = len(lesson.teacher_prompt) + max(recipe.max_new_tokens, len(lesson.response))
        if need > window:
            opening = lesson.demonstration.messages[-1].content[:60]
            raise TrainingRefused(
                f"Demonstration {number} of skill {lesson.skill!r} (“{opening}”) needs {need} tokens with "
                f"its teacher context ({len(lesson.teacher_prompt)}) and answer; the base model's window "
                f"is {window}.",
                param="demonstrations",
                code="teacher_prompt_too_long",
            )
    return longest


def measure_gap(
    model: Model, teacher: Teacher, recipe: Recipe, holdout: Sequence[tuple[Grader, Lesson]]
) -> Gap:
    """Greedy answers of student and teacher on at most MEASURED_ITEMS held-out items, graded."""
    stride = max(1, len(holdout) // MEASURED_ITEMS)
    items = list(holdout[::stride][:MEASURED_ITEMS])
    if not items:
        return Gap(0, 0.0, 0.0)
    with model.using("student"):
        student = _score(model, items, [lesson.prompt for _, lesson in items], recipe)
    with model.using(teacher.adapter):
        taught = _score(model, items, [lesson.teacher_prompt for _, lesson in items], recipe)
    return Gap(len(items), student, taught)


def check_gap(measured: Gap, recipe: Recipe) -> None:
    """Raises TrainingRefused when the teacher is hardly better than the student and the recipe says so."""
    if measured.items and measured.gap < recipe.min_teacher_gap and recipe.on_small_gap == "refuse":
        raise TrainingRefused(
            f"With a demonstration in its context the model scores {measured.teacher_score:.2f} on "
            f"{measured.items} held-out items and without one {measured.student_score:.2f}: a gap of "
            f"{measured.gap:.2f}, below min_teacher_gap {recipe.min_teacher_gap:.2f}, leaves nothing to "
            "learn. Try context 'turns', more demonstration_repeats or a larger base model, or set "
            "on_small_gap to 'train'.",
            param="recipe.min_teacher_gap",
            code="teacher_gap_too_small",
        )


def _score(
    model: Model, items: list[tuple[Grader, Lesson]], prompts: list[list[int]], recipe: Recipe
) -> float:
    answers = sample(model, prompts, [recipe.max_new_tokens] * len(prompts), GREEDY)
    texts = [model.text(answer.tokens) for answer in answers]
    scores = [
        grade(grader, text, lesson.demonstration.answer)
        for (grader, lesson), text in zip(items, texts, strict=True)
    ]
    return sum(scores) / len(scores)
