"""What is checked before a single step: every prompt fits, the data is sound, the teacher knows more."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from domain.data_checks import findings, quoted, text_problems
from domain.demonstration import Split
from domain.errors import TrainingRefused
from domain.preflight import FindingCode, Place, PreflightReport
from domain.recipe import Recipe
from domain.skill import Grader
from domain.training import TrainingJob
from trainer.contexts import Lesson
from trainer.model import Model
from trainer.preflight_gap import gap_findings, has_teacher, masked_findings, measure_gap
from trainer.teacher import Teacher

Problem = tuple[FindingCode, Place]


def examine(
    job: TrainingJob,
    model: Model,
    teacher: Teacher,
    *,
    lessons: Sequence[Lesson],
    holdout: Sequence[tuple[Grader, Lesson]],
    rehearsal: Sequence[list[int]],
    steps: int,
) -> PreflightReport:
    """Every check of the data and, where it has no error, the gap between student and teacher.

    `lessons`, `holdout` and `rehearsal` are the job's as token ids, in its order; `steps` is the length of
    its schedule. Trains nothing and changes no weights.
    """
    held_out = [lesson for _, lesson in holdout]
    controls = control_tokens(model.tokenizer)
    problems: list[Problem] = []
    for skill in job.skills:
        problems += text_problems(skill.name, "train", skill.train)
        problems += text_problems(skill.name, "holdout", skill.holdout)
    prepared: dict[Split, Sequence[Lesson]] = {"train": lessons, "holdout": held_out}
    for split, members in prepared.items():
        problems += _length_problems(split, members, job.recipe, model.context_window)
        problems += _control_problems(split, members, controls)
    problems += _rehearsal_problems(rehearsal, job.recipe.max_rehearsal_tokens, model.context_window)
    found = [*findings(problems), *masked_findings(lessons, job.recipe)]
    report = PreflightReport(
        items=0,
        student_score=None,
        teacher_score=None,
        gap=None,
        longest_prompt_tokens=max(len(_longest_read(one, job.recipe)) for one in [*lessons, *held_out]),
        steps=steps,
        findings=found,
    )
    if report.errors:
        return report
    measured = measure_gap(model, teacher.adapter, job.recipe, holdout)
    found += list(gap_findings(measured, job.recipe, lessons, str(model.tokenizer.chat_template)))
    taught, difference = measured.teacher, measured.difference
    return report.model_copy(
        update={
            "items": measured.items,
            "student_score": measured.student.score,
            "teacher_score": None if taught is None else taught.score,
            "gap": None if difference is None else difference.mean,
            "gap_low": None if difference is None else difference.low,
            "gap_high": None if difference is None else difference.high,
            "student_tokens": measured.student.mean_length,
            "teacher_tokens": None if taught is None else taught.mean_length,
            "student_truncated": measured.student.truncated_share,
            "teacher_truncated": None if taught is None else taught.truncated_share,
            "findings": found,
        }
    )


def refuse(report: PreflightReport) -> None:
    """Raises TrainingRefused for the report's errors: all messages, the code and field of the first."""
    if report.errors:
        first = report.errors[0]
        raise TrainingRefused(report.refusal(), param=first.param, code=first.code)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens wherever they stand, sorted."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Some models pad with an ordinary character: it controls nothing.
    return sorted(token for token in {*added, *tokenizer.all_special_tokens} if len(token.strip()) > 1)


def _longest_read(lesson: Lesson, recipe: Recipe) -> list[int]:
    return lesson.teacher_prompt if has_teacher(recipe) else lesson.prompt


def _numbered(lessons: Sequence[Lesson]) -> Iterator[tuple[int, Lesson]]:
    """Each lesson with its number in its own skill's list."""
    counts: dict[str, int] = {}
    for lesson in lessons:
        counts[lesson.skill] = counts.get(lesson.skill, 0) + 1
        yield counts[lesson.skill], lesson


def _length_problems(
    split: Split, lessons: Sequence[Lesson], recipe: Recipe, window: int
) -> Iterator[Problem]:
    """Lessons whose prompt and answer exceed the window: nothing is ever truncated."""
    for number, lesson in _numbered(lessons):
        prompt = len(_longest_read(lesson, recipe))
        answer = max(recipe.max_new_tokens, len(lesson.response))
        if prompt + answer > window:
            detail = (
                f"{quoted(lesson.demonstration)} needs {prompt + answer} tokens ({prompt} of them its prompt "
                f"with what the teacher is shown, {answer} the answer); the window is {window}"
            )
            yield (
                "teacher_prompt_too_long",
                Place(skill=lesson.skill, split=split, number=number, detail=detail),
            )


def _control_problems(split: Split, lessons: Sequence[Lesson], controls: Sequence[str]) -> Iterator[Problem]:
    """Lessons in whose texts the tokenizer finds a control token."""
    for number, lesson in _numbered(lessons):
        taught = lesson.demonstration
        texts = {f"message {at}": message.content for at, message in enumerate(taught.messages, start=1)}
        texts |= {"the response": taught.response, "the context": taught.context or ""}
        found = [f"{one} in {where}" for where, text in texts.items() for one in controls if one in text]
        if found:
            detail = f"{quoted(taught)} has {', '.join(found)}"
            yield "control_token", Place(skill=lesson.skill, split=split, number=number, detail=detail)


def _rehearsal_problems(prompts: Sequence[list[int]], answer: int, window: int) -> Iterator[Problem]:
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) + answer > window:
            detail = (
                f"has {len(prompt)} tokens, {answer} more with max_rehearsal_tokens; the window is {window}"
            )
            yield (
                "rehearsal_prompt_too_long",
                Place(skill=None, split="rehearsal", number=number, detail=detail),
            )
