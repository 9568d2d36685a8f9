"""How much better the teacher answers than the student, before any training: on it the final gain depends.

"The final gain is about linear in the initial gap between student and self-teacher" (arXiv 2605.30070).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from domain.grading import grade, reasons_first
from domain.paired import Difference, cautious_difference
from domain.preflight import Finding
from domain.recipe import Recipe
from domain.skill import Grader
from trainer import distributed
from trainer.contexts import Lesson
from trainer.methods import plan_of
from trainer.model import Model, Role
from trainer.rollout import GREEDY, sample

MEASURED_ITEMS = 32
"""Held-out items answered by student and teacher: about ten seconds on two cores."""
KEPT_LENGTH = 0.75
"""A thinking model's answers may shrink to this share. The paper's Olmo-3-7B-Think kept 0.91 of its length
with SDFT and its score rose; with SFT it kept 0.71 and fell."""


@dataclass(frozen=True)
class Answers:
    """One greedy answer to each measured item."""

    scores: list[float]
    lengths: list[int]
    """Tokens, with the one that ends the answer."""
    truncated: list[bool]

    @property
    def score(self) -> float | None:
        return _mean(self.scores)

    @property
    def mean_length(self) -> float | None:
        return _mean(self.lengths)

    @property
    def truncated_share(self) -> float | None:
        return _mean(self.truncated)


@dataclass(frozen=True)
class Gap:
    """Student and teacher on identical items; `teacher` is None where the method has none."""

    student: Answers
    teacher: Answers | None

    @property
    def items(self) -> int:
        return len(self.student.scores)

    @property
    def difference(self) -> Difference | None:
        """Teacher minus student with its 95% interval (paired, Bonett and Price); None without items."""
        if self.teacher is None or not self.items:
            return None
        pairs = zip(self.student.scores, self.teacher.scores, strict=True)
        return cautious_difference([taught - own for own, taught in pairs])


def measure_gap(
    model: Model, teacher: Role | None, recipe: Recipe, holdout: Sequence[tuple[Grader, Lesson]]
) -> Gap:
    """Greedy answers on at most MEASURED_ITEMS held-out items, evenly spread; nothing without any.

    `teacher` is the role that scores the student's answers in training: None is the bare base. It is shown
    each item's own demonstration, as in training.
    """
    items = measured_items(holdout)
    student = student_answers(model, recipe, holdout)
    if not has_teacher(recipe):
        return Gap(student, None)
    prompts = [lesson.teacher_prompt for _, lesson in items]
    return Gap(student, _answers(model, teacher, items, prompts, recipe))


def student_answers(model: Model, recipe: Recipe, holdout: Sequence[tuple[Grader, Lesson]]) -> Answers:
    """The student's greedy answers, without a demonstration, on the same items as `measure_gap`."""
    items = measured_items(holdout)
    return _answers(model, "student", items, [lesson.prompt for _, lesson in items], recipe)


def measured_items(holdout: Sequence[tuple[Grader, Lesson]]) -> list[tuple[Grader, Lesson]]:
    """At most MEASURED_ITEMS of them, evenly spread, since they stand skill by skill."""
    count = min(len(holdout), MEASURED_ITEMS)
    return [holdout[place * len(holdout) // count] for place in range(count)]


def has_teacher(recipe: Recipe) -> bool:
    """Whether the method shows demonstrations to anybody."""
    plan = plan_of(recipe)
    return plan.loss == "divergence" or plan.responses == "teacher"


def gap_findings(
    measured: Gap, recipe: Recipe, lessons: Sequence[Lesson], chat_template: str
) -> Iterator[Finding]:
    """What the gap and the lengths of the answers say; `lessons` are those that are trained on."""
    difference = measured.difference
    if not measured.items:
        yield Finding(
            code="nothing_held_out",
            severity="warning",
            message="No demonstration is held out.",
            why="Whether there is anything to learn, and later whether it was learned, stays unmeasured.",
            mend="Raise holdout_fraction, or add demonstrations.",
            param="holdout_fraction",
        )
    if difference is not None and measured.teacher is not None:
        told = (
            f"With a demonstration in its context the model scores {measured.teacher.score:.2f} on "
            f"{measured.items} held-out items and without one {measured.student.score:.2f}: a gap of "
            f"{difference.mean:.2f} (95% interval {difference.low:.2f} to {difference.high:.2f})"
        )
        if difference.mean < recipe.min_teacher_gap:
            yield Finding(
                code="teacher_gap_too_small",
                severity="error" if recipe.on_small_gap == "refuse" else "warning",
                message=f"{told}, below min_teacher_gap {recipe.min_teacher_gap:.2f}.",
                why="The student learns what the teacher does better: this leaves nothing to learn.",
                mend="Try context 'turns', more demonstration_repeats or a larger base model, or set "
                "on_small_gap to 'train'.",
                param="recipe.min_teacher_gap",
            )
        elif difference.low <= 0:
            yield Finding(
                code="teacher_gap_uncertain",
                severity="warning",
                message=f"{told}, which may be chance.",
                why="The final gain is about proportional to this gap.",
                mend="Hold more demonstrations out to know it better.",
                param="holdout_fraction",
            )
    if measured.student.truncated_share == 1.0 and plan_of(recipe).responses == "student":
        yield Finding(
            code="answers_truncated",
            severity="warning",
            message=f"All of the model's own answers reach max_new_tokens, {recipe.max_new_tokens}.",
            why="Answers that are cut off count nowhere: until some end, only demonstrations' tokens teach.",
            mend="Raise max_new_tokens above the length of an answer, or off_policy_share.",
            param="recipe.max_new_tokens",
        )
    if reasons_first(chat_template):
        yield from _length_findings(measured, lessons)


def masked_findings(lessons: Sequence[Lesson], recipe: Recipe) -> Iterator[Finding]:
    """Right answers that are so short that `skip_first_tokens` leaves nothing of them to learn from."""
    skip = recipe.skip_first_tokens
    if plan_of(recipe).loss != "divergence" or not skip:
        return
    masked = sum(len(lesson.response) <= skip for lesson in lessons)
    if masked:
        yield Finding(
            code="response_masked",
            severity="error" if masked == len(lessons) else "warning",
            message=f"{masked} of {len(lessons)} demonstrations have at most {skip} response tokens, the one "
            "that ends them included, and the loss leaves the first "
            f"{skip} out.",
            why="An answer of that length teaches nothing.",
            mend="Set skip_first_tokens to 0.",
            param="recipe.skip_first_tokens",
        )


def _length_findings(measured: Gap, lessons: Sequence[Lesson]) -> Iterator[Finding]:
    """For a model that reasons before it answers: will its reasoning shrink?"""
    own = measured.student.mean_length
    if measured.teacher is not None:
        target, whose = measured.teacher.mean_length, "the teacher's answers"
    else:
        target, whose = _mean([len(lesson.response) for lesson in lessons]), "the demonstrations"
    if own is None or target is None or target >= KEPT_LENGTH * own:
        return
    yield Finding(
        code="reasoning_shortened",
        severity="warning",
        message=f"This model reasons before it answers, {own:.0f} tokens on average; {whose} have "
        f"{target:.0f}.",
        why="Training on shorter answers teaches it to reason less, which costs more than the skill gains.",
        mend="Use method 'sdft' with a context that keeps the reasoning ('instruction'), or demonstrations "
        "with their reasoning.",
        param="recipe.context",
    )


def _answers(
    model: Model,
    role: Role | None,
    items: Sequence[tuple[Grader, Lesson]],
    prompts: list[list[int]],
    recipe: Recipe,
) -> Answers:
    with model.using(role):
        drawn = sample(model, prompts, [recipe.max_new_tokens] * len(prompts), GREEDY)
    # Processes that train together decide by the scores, and a pattern near its time limit may match in one
    # and not in another.
    scores = distributed.by_first(
        lambda: [
            grade(grader, model.text(answer.tokens), lesson.demonstration.answer)
            for (grader, lesson), answer in zip(items, drawn, strict=True)
        ]
    )
    return Answers(scores, [len(answer.tokens) for answer in drawn], [answer.truncated for answer in drawn])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
