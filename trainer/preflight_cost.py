"""What a training will take: a few real steps on an excerpt of the job, extrapolated to its schedule.

Seconds are the probe's per token, times the schedule's tokens; of sampling, the probe's per decoded token,
times the rounds. What the schedule does not hold is not counted: checkpoints, measurements between steps.
Memory is the largest of what a step on the longest demonstrations, a step as planned and everything before
them took, plus what grows later.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import AutoConfig

from domain.preflight import Cost, Finding, PreflightReport
from domain.recipe import Recipe
from domain.training import StepLine, TrainerLine, TrainingJob
from trainer.batches import Schedule
from trainer.contexts import Lesson, chat_tokens
from trainer.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from trainer.model import Model, compute_dtype
from trainer.packing import BATCH_TOKENS
from trainer.preflight_gap import WITHOUT_TEACHER
from trainer.rollout import MAX_ROWS
from trainer.run import Run
from trainer.teacher import OWN_STATES_BYTES

TYPICAL_LESSONS = 64
"""Evenly spread over the job's lengths: what is timed."""
PROBE_NEW_TOKENS = 32
"""Decoded in the probe's answers: a long answer is more of the same."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of everything that a schedule's indices point at, and of the answers that are sampled."""

    prompts: list[int]
    teacher_prompts: list[int]
    responses: list[int]
    rehearsal: list[int]
    answer: float
    """Mean of a sample on a lesson."""
    rehearsed: float
    """Mean of a sample on a rehearsal prompt."""


@dataclass
class Work:
    """Tokens that some steps read, as the passes see them without packing."""

    student: float = 0.0
    teacher: float = 0.0
    samples: int = 0
    _cached: set[int] = field(default_factory=set)

    def add(self, schedule: Schedule, steps: Iterable[int], lengths: Lengths, recipe: Recipe) -> "Work":
        """Count `steps`. A frozen teacher reads a demonstration's own tokens once in all."""
        frozen = recipe.teacher in ("parent", "base")
        taught = recipe.method not in WITHOUT_TEACHER
        for step in steps:
            batch = schedule.batch(step)
            for index in batch.on_policy:
                self.samples += recipe.rollouts_per_prompt
                self.student += recipe.rollouts_per_prompt * (lengths.prompts[index] + lengths.answer)
                if taught:
                    self.teacher += recipe.rollouts_per_prompt * (
                        lengths.teacher_prompts[index] + lengths.answer
                    )
            for index in batch.off_policy:
                self.student += lengths.prompts[index] + lengths.responses[index]
                if taught and not (frozen and index in self._cached):
                    self.teacher += lengths.teacher_prompts[index] + lengths.responses[index]
                    self._cached.add(index)
            for index in batch.rehearsal:
                self.samples += 1
                self.student += lengths.rehearsal[index] + lengths.rehearsed
                self.teacher += lengths.rehearsal[index] + lengths.rehearsed
        return self


def estimate_cost(job: TrainingJob, model: Model, run: Run, report: PreflightReport) -> Cost:
    """Run a few steps of excerpts of `job` on `model`, which is spoilt for training by it.

    `run` is the job's own, not begun; `report` has the lengths of the answers where they were measured.
    """
    recipe, began = job.recipe, time.monotonic()
    peak = peak_bytes(model.device)
    rehearsal = [len(chat_tokens(model.tokenizer, messages)) for messages in job.rehearsal]
    whole = _lengths(
        run.material.lessons, rehearsal, _answer_length(report, recipe), recipe.max_rehearsal_tokens
    )

    # The first steps also warm the libraries up: they are for memory, the ones after them for time.
    longest = _longest(run.material.lessons, recipe)
    before = used_bytes(model.device)
    reset_peak(model.device)
    _step(_excerpt(job, longest, _short(recipe, batch_size=len(longest), rehearsal_share=0.0)), model)
    activations = peak_bytes(model.device) - before
    peak = max(peak, before + round(activations * _growth(len(longest), whole, recipe)))

    typical = _typical(run.material.lessons)
    excerpt = _excerpt(job, typical, _short(recipe))
    reset_peak(model.device)
    probe, line = _step(excerpt, model)
    peak = max(peak, peak_bytes(model.device) + _later_bytes(job, run, recipe))

    lengths = _lengths(
        probe.material.lessons,
        rehearsal,
        line.response_tokens,
        min(recipe.max_rehearsal_tokens, PROBE_NEW_TOKENS),
    )
    measured = Work().add(probe.material.schedule, range(1), lengths, recipe)
    planned = Work().add(run.material.schedule, range(run.material.schedule.steps), whole, recipe)
    rollout = line.rollout_seconds * _decoding(report, recipe) if planned.samples else 0.0
    rounds = math.ceil(run.material.schedule.steps / recipe.rollout_every)
    costs = {
        "rollout_seconds": rollout * rounds,
        "teacher_seconds": _scaled(line.teacher_seconds, planned.teacher, measured.teacher),
        "student_seconds": _scaled(line.student_seconds, planned.student, measured.student),
    }
    return Cost(
        seconds=sum(costs.values()),
        **costs,
        probe_seconds=time.monotonic() - began,
        parameter_bytes=model.weight_bytes(),
        peak_bytes=peak,
        available_bytes=available_bytes(model.device),
        device=str(model.device),
    )


def memory_findings(cost: Cost) -> list[Finding]:
    """Whether the training fits."""
    if cost.peak_bytes <= cost.available_bytes:
        return []
    return [
        Finding(
            code="not_enough_memory",
            severity="warning",
            message=f"Training is expected to need {cost.peak_bytes / 1e9:.2f} GB on {cost.device}, where "
            f"{cost.available_bytes / 1e9:.2f} GB can be had.",
            why="The system kills a process that asks for more.",
            mend="Lower max_new_tokens or lora_rank, shorten the longest demonstrations, or take a smaller "
            "base model.",
            param="recipe.max_new_tokens",
        )
    ]


def _step(job: TrainingJob, model: Model) -> tuple[Run, StepLine]:
    """The first step of a job, with its figures."""
    lines: list[TrainerLine] = []
    run = Run(job, model, lines.append)
    run.take_step()
    return run, next(line for line in lines if isinstance(line, StepLine))


def _short(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with short answers and without measurements between steps."""
    short = {
        "max_new_tokens": min(recipe.max_new_tokens, PROBE_NEW_TOKENS),
        "max_rehearsal_tokens": min(recipe.max_rehearsal_tokens, PROBE_NEW_TOKENS),
        "early_stop_every": None,
        "kl_to_base_every": 0,
    }
    return recipe.model_copy(update=short | changes)


def _excerpt(job: TrainingJob, chosen: Sequence[int], recipe: Recipe) -> TrainingJob:
    """The job with the chosen lessons, which count over all skills, and nothing held out."""
    wanted, skills, first = set(chosen), [], 0
    for skill in job.skills:
        train = [one for at, one in enumerate(skill.train, start=first) if at in wanted]
        first += len(skill.train)
        if train:
            skills.append(skill.model_copy(update={"train": train, "holdout": []}))
    return job.model_copy(update={"skills": skills, "recipe": recipe})


def _size(lesson: Lesson) -> int:
    return len(lesson.prompt) + len(lesson.response)


def _typical(lessons: Sequence[Lesson]) -> list[int]:
    """Indices of at most TYPICAL_LESSONS, evenly spread from the shortest to the longest."""
    by_size = sorted(range(len(lessons)), key=lambda at: _size(lessons[at]))
    count = min(len(by_size), TYPICAL_LESSONS)
    return [by_size[(2 * place + 1) * len(by_size) // (2 * count)] for place in range(count)]


def _longest(lessons: Sequence[Lesson], recipe: Recipe) -> list[int]:
    """Indices of the longest lessons, as many as fill one forward pass, at least one."""
    by_size = sorted(range(len(lessons)), key=lambda at: -_size(lessons[at]))
    chosen, tokens = by_size[:1], _size(lessons[by_size[0]])
    for at in by_size[1 : recipe.batch_size]:
        tokens += _size(lessons[at])
        if tokens > BATCH_TOKENS:
            break
        chosen.append(at)
    return chosen


def _lengths(lessons: Sequence[Lesson], rehearsal: list[int], answer: float, rehearsed: float) -> Lengths:
    return Lengths(
        prompts=[len(lesson.prompt) for lesson in lessons],
        teacher_prompts=[len(lesson.teacher_prompt) for lesson in lessons],
        responses=[len(lesson.response) for lesson in lessons],
        rehearsal=rehearsal,
        answer=answer,
        rehearsed=rehearsed,
    )


def _answer_length(report: PreflightReport, recipe: Recipe) -> float:
    """Mean tokens of a sample over the training: it begins as the student's and ends as the teacher's."""
    if report.student_tokens is None:
        return recipe.max_new_tokens
    if report.teacher_tokens is None:
        return report.student_tokens
    return (report.student_tokens + report.teacher_tokens) / 2


def _decoding(report: PreflightReport, recipe: Recipe) -> float:
    """How many times the probe's decoding steps a round of the training takes: as many as its longest
    answer has tokens."""
    short = _short(recipe)
    sampled = recipe.off_policy_share < 1
    ends = []
    for tokens, truncated in (
        (report.student_tokens, report.student_truncated),
        (report.teacher_tokens, report.teacher_truncated),
    ):
        # Among many rows one is about twice as long as the mean, and where some are cut, one is cut.
        known = tokens is not None and not truncated
        ends.append(min(recipe.max_new_tokens, 2 * tokens) if known and tokens else recipe.max_new_tokens)
    probed = max(
        min(ends[0], short.max_new_tokens) if sampled else 0,
        short.max_rehearsal_tokens if recipe.rehearsal_share else 0,
    )
    rehearsed = recipe.max_rehearsal_tokens if recipe.rehearsal_share else 0
    planned = [max(end if sampled else 0, rehearsed) for end in ends]
    return sum(planned) / len(planned) / probed if probed else 0.0


def _scaled(seconds: float, planned: float, measured: float) -> float:
    return seconds * planned / measured if measured else 0.0


def _growth(probed: int, whole: Lengths, recipe: Recipe) -> float:
    """Tokens of the training's largest forward pass with gradients over those of the probe's."""
    short = _short(recipe)
    on_policy = recipe.off_policy_share < 1 and recipe.method not in WITHOUT_TEACHER

    def longest_first(limit: int) -> list[int]:
        answer = limit if on_policy else 0
        pairs = zip(whole.prompts, whole.responses, strict=True)
        return sorted((prompt + max(response, answer) for prompt, response in pairs), reverse=True)

    real = longest_first(recipe.max_new_tokens)
    measured = longest_first(short.max_new_tokens)
    return max(
        1.0,
        min(max(BATCH_TOKENS, real[0]), sum(real[: recipe.batch_size]))
        / min(max(BATCH_TOKENS, measured[0]), sum(measured[:probed])),
    )


def _later_bytes(job: TrainingJob, run: Run, recipe: Recipe) -> int:
    """What grows after the probe: keys and values of longer answers, a frozen teacher's kept states."""
    config = AutoConfig.from_pretrained(job.base_path).get_text_config()
    bytes_each = compute_dtype().itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = min(MAX_ROWS, recipe.rollout_every * recipe.batch_size * recipe.rollouts_per_prompt)
    longer = recipe.max_new_tokens - min(recipe.max_new_tokens, PROBE_NEW_TOKENS)
    cache = rows * longer * config.num_hidden_layers * 2 * heads * width * bytes_each
    if recipe.teacher not in ("parent", "base") or recipe.method in WITHOUT_TEACHER:
        return cache
    kept = sum(len(lesson.response) for lesson in run.material.lessons) * config.hidden_size * bytes_each
    return cache + min(kept, OWN_STATES_BYTES)
