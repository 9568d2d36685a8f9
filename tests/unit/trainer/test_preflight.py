"""Preflight on a tiny model: every place is named, errors refuse, warnings don't, the gap has an interval."""

import math
from pathlib import Path

import pytest

from domain.demonstration import Demonstration, Message
from domain.errors import TrainingRefused
from domain.preflight import Finding, PreflightReport
from domain.skill import ExactGrader
from domain.training import PreflightLine, TrainerLine, TrainingJob
from tests.unit.trainer.builders import demonstration
from trainer.contexts import Lesson
from trainer.loading import load_model
from trainer.preflight import control_tokens, refuse
from trainer.preflight_gap import Answers, Gap, gap_findings, measured_items
from trainer.run import Run, train


def examine(job: TrainingJob) -> PreflightReport:
    return Run(job, load_model(Path(job.base_path), job.recipe, None), lambda line: None).examine()


def with_train(job: TrainingJob, *more: Demonstration) -> TrainingJob:
    skill = job.skills[0].model_copy(update={"train": [*job.skills[0].train, *more]})
    return job.model_copy(update={"skills": [skill]})


def with_recipe(job: TrainingJob, **changes: object) -> TrainingJob:
    return job.model_copy(update={"recipe": job.recipe.model_copy(update=changes)})


def named(report: PreflightReport, code: str) -> Finding:
    (finding,) = [one for one in report.findings if one.code == code]
    return finding


def test_all_prompts_that_are_too_long_are_named_and_nothing_is_measured(job: TrainingJob) -> None:
    held = job.skills[0].model_copy(
        update={"holdout": [*job.skills[0].holdout, demonstration("thanks " * 60, "A")]}
    )
    long = with_train(
        job.model_copy(update={"skills": [held]}),
        demonstration("please " * 60, "A"),
        demonstration("short", "A"),
        demonstration("word " * 90, "A"),
    )
    report = examine(with_recipe(long, num_context_demonstrations=0))
    finding = named(report, "teacher_prompt_too_long")
    assert (finding.severity, finding.param) == ("error", "demonstrations")
    assert [(place.split, place.number) for place in finding.places] == [
        ("train", 9),
        ("train", 11),
        ("holdout", 3),
    ]
    # Twice <s> "user:" 420 bytes </s>, between them <s> "assistant:A" </s>, <s> "assistant:" at the end.
    assert finding.places[0].detail.startswith("“please please")
    assert finding.places[0].detail.endswith(
        "needs 884 tokens (878 of them its prompt with what the teacher is shown, 6 the answer); "
        "the window is 512"
    )
    assert (report.items, report.student_score, report.gap, report.cost) == (0, None, None, None)


def test_the_length_that_counts_is_the_teachers_where_there_is_one(job: TrainingJob) -> None:
    """A prompt of 300 bytes: alone 300 + 22 + 6 tokens, with its demonstration in a turn over 600."""
    long = with_train(job, demonstration("x" * 300, "A"))
    assert examine(long).errors != []
    report = examine(with_recipe(long, method="sft"))
    assert report.errors == []
    # <s> "user:" 300 bytes </s> <s> "assistant:".
    assert report.longest_prompt_tokens == 1 + 5 + 300 + 1 + 1 + 10


def test_control_tokens_are_found_wherever_they_stand(job: TrainingJob) -> None:
    system = Message(role="system", content="be <s> brief")
    spoiled = Demonstration(
        messages=[system, Message(role="user", content="q")], response="A</s>B", context="c", answer="A"
    )
    report = examine(with_train(job, spoiled))
    finding = named(report, "control_token")
    assert finding.severity == "error"
    (place,) = finding.places
    assert (place.number, place.detail) == (9, "“q” has <s> in message 1, </s> in the response")


def test_control_tokens_are_the_tokenizers_special_ones(job: TrainingJob) -> None:
    model = load_model(Path(job.base_path), job.recipe, None)
    assert control_tokens(model.tokenizer) == ["</s>", "<s>"]
    model.tokenizer.pad_token = "!"
    assert "!" in model.tokenizer.all_special_tokens
    assert control_tokens(model.tokenizer) == ["</s>", "<s>"]


def test_a_rehearsal_prompt_that_is_too_long_is_named_where_it_is_used(job: TrainingJob) -> None:
    """505 bytes and 18 of the template with 5 of an answer exceed 512."""
    long = job.model_copy(update={"rehearsal": [*job.rehearsal, [Message(role="user", content="x" * 505)]]})
    place = named(examine(long), "rehearsal_prompt_too_long").places[0]
    assert (place.skill, place.split, place.number) == (None, "rehearsal", 4)
    assert examine(with_recipe(long, rehearsal_share=0.0)).errors == []


def test_data_warnings_do_not_keep_the_gap_from_being_measured(job: TrainingJob) -> None:
    taught = job.skills[0].train[0]
    contradiction = demonstration(taught.messages[0].content, "other")
    report = examine(with_train(job, contradiction))
    assert named(report, "label_conflict").severity == "warning"
    assert named(report, "label_conflict").places[0].like == 1
    assert report.items == 2
    # A random model answers neither right: no difference on two items, [0, 0, +1, -1] after Bonett and Price,
    # standard error sqrt((2 / 3) / 4).
    assert (report.student_score, report.teacher_score, report.gap) == (0.0, 0.0, 0.0)
    assert report.gap_high == pytest.approx(1.959964 * math.sqrt(2 / 3 / 4))
    assert report.gap_low == pytest.approx(-1.959964 * math.sqrt(2 / 3 / 4))
    assert report.student_tokens is not None
    assert 1 <= report.student_tokens <= job.recipe.max_new_tokens
    assert report.student_truncated in (0.0, 0.5, 1.0)


def test_without_held_out_items_scores_are_absent_not_zero(job: TrainingJob) -> None:
    skill = job.skills[0].model_copy(update={"holdout": []})
    report = examine(job.model_copy(update={"skills": [skill]}))
    assert report.items == 0
    assert report.student_score is report.teacher_score is report.gap is report.gap_low is None
    assert report.student_tokens is report.teacher_tokens is report.student_truncated is None
    assert named(report, "nothing_held_out").severity == "warning"
    assert report.summary() == "Preflight: nothing measured; 8 steps."


def test_a_method_without_a_teacher_measures_the_student_alone(job: TrainingJob) -> None:
    report = examine(with_recipe(job, method="sft", on_small_gap="refuse"))
    assert (report.student_score, report.teacher_score, report.gap) == (0.0, None, None)
    assert report.errors == []


def test_training_reports_before_it_refuses(job: TrainingJob) -> None:
    lines: list[TrainerLine] = []
    bad = with_train(job, demonstration("please " * 60, "A"), demonstration("p", "A</s>"))
    with pytest.raises(
        TrainingRefused, match=r"demonstration 9 of skill 'sort': “please.*has </s>"
    ) as refused:
        train(bad, lines.append, lambda: False)
    assert (refused.value.code, refused.value.param) == ("teacher_prompt_too_long", "demonstrations")
    (line,) = lines
    assert isinstance(line, PreflightLine)
    assert [finding.code for finding in line.errors] == ["teacher_prompt_too_long", "control_token"]


def test_a_refusal_names_a_few_places_and_counts_the_rest(job: TrainingJob) -> None:
    report = examine(with_train(job, *(demonstration(f"p{n}", "A</s>") for n in range(5))))
    with pytest.raises(TrainingRefused) as refused:
        refuse(report)
    told = refused.value.message
    assert "5 demonstrations contain control tokens" in told
    assert [f"demonstration {n} of" in told for n in range(9, 14)] == [True, True, True, False, False]
    assert "in the response; and 2 more. Remove it" in told


def answers(scores: list[float], length: int = 10) -> Answers:
    return Answers(scores, [length] * len(scores), [False] * len(scores))


def found(job: TrainingJob, measured: Gap, template: str = "", **changes: object) -> list[Finding]:
    lesson = Lesson("sort", job.skills[0].train[0], [1], [1], 0, [1] * 20)
    recipe = job.recipe.model_copy(update={"on_small_gap": "refuse", **changes})
    return list(gap_findings(measured, recipe, [lesson], template))


def test_gap_small_uncertain_and_clear(job: TrainingJob) -> None:
    same = Gap(answers([0.0, 1.0] * 8), answers([0.0, 1.0] * 8))
    assert [(f.code, f.severity) for f in found(job, same)] == [("teacher_gap_too_small", "error")]
    assert found(job, same, on_small_gap="train")[0].severity == "warning"
    # One of four better: 1 0 0 0 +1 -1, mean 1/6, variance (3 - 1/6) / 5, below zero at the low end.
    maybe = Gap(answers([0.0] * 4), answers([1.0, 0.0, 0.0, 0.0]))
    difference = maybe.difference
    assert difference is not None
    assert difference == pytest.approx(
        (0.25, 1 / 6 - 1.959964 * math.sqrt(17 / 30 / 6), 1 / 6 + 1.959964 * math.sqrt(17 / 30 / 6)), abs=1e-6
    )
    assert [(f.code, f.severity) for f in found(job, maybe)] == [("teacher_gap_uncertain", "warning")]
    assert found(job, Gap(answers([0.0] * 16), answers([1.0] * 16))) == []


def test_a_thinking_model_is_warned_when_its_answers_would_shrink(job: TrainingJob) -> None:
    """Its reasoning is 100 tokens: the teacher's 70 are below three quarters, 80 are not; demonstrations have
    20. A model without reasoning shall answer as briefly as it likes."""
    clear = [0.0] * 16, [1.0] * 16
    short = Gap(answers(clear[0], 100), answers(clear[1], 70))
    kept = Gap(answers(clear[0], 100), answers(clear[1], 80))
    template = "{{ '<think>' }}"
    assert [f.code for f in found(job, short, template)] == ["reasoning_shortened"]
    assert found(job, kept, template) == []
    assert found(job, short) == []
    alone = Gap(answers(clear[0], 100), None)
    assert "the demonstrations have 20" in found(job, alone, template, method="sft")[0].message


def test_answers_that_the_mask_hides_are_told(job: TrainingJob) -> None:
    """The skill's answers are three letters and an end: four tokens."""
    assert "response_masked" not in {finding.code for finding in examine(job).findings}
    assert not [
        f for f in examine(with_recipe(job, skip_first_tokens=3)).findings if f.code == "response_masked"
    ]
    hidden = named(examine(with_recipe(job, skip_first_tokens=4)), "response_masked")
    assert (hidden.severity, hidden.param) == ("error", "recipe.skip_first_tokens")
    assert hidden.message.startswith("8 of 8 demonstrations have at most 4 response tokens")
    longer = with_train(with_recipe(job, skip_first_tokens=4), demonstration("more", "ABAB"))
    assert named(examine(longer), "response_masked").severity == "warning"
    supervised = examine(with_recipe(job, skip_first_tokens=4, method="sft"))
    assert "response_masked" not in {finding.code for finding in supervised.findings}


def test_a_model_that_never_ends_its_answers_is_told(job: TrainingJob) -> None:
    cut = Gap(Answers([0.0] * 16, [6] * 16, [True] * 16), answers([1.0] * 16))
    (finding,) = found(job, cut)
    assert (finding.code, finding.severity, finding.param) == (
        "answers_truncated", "warning", "recipe.max_new_tokens",
    )  # fmt: skip
    ended = Gap(Answers([0.0] * 16, [6] * 16, [True] * 15 + [False]), answers([1.0] * 16))
    assert found(job, ended) == []
    assert found(job, cut, method="offline_distillation") == []


@pytest.mark.parametrize(("held_out", "first", "last"), [(20, 0, 19), (63, 0, 61), (64, 0, 62), (95, 0, 92)])
def test_measured_items_are_spread_over_all(held_out: int, first: int, last: int) -> None:
    """32 of 63: the last is 31 * 63 // 32."""
    lessons = [Lesson("s", demonstration(f"{n}", "A"), [n], [n], 0, [1]) for n in range(held_out)]
    measured = measured_items([(ExactGrader(), lesson) for lesson in lessons])
    assert len(measured) == min(32, held_out)
    assert [measured[0][1].prompt, measured[-1][1].prompt] == [[first], [last]]
