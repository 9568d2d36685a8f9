"""What a training will take: a few real steps on an excerpt of the job, extrapolated to its schedule.

Seconds are the probe's per token, times the schedule's tokens; of sampling, the probe's per decoded token,
times the rounds. What stands between steps is not counted: checkpoints, early stopping, the KL to the base.
Memory is the most that anything took up to the end of the probe, plus what grows later.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from domain.preflight import Cost, Finding, PreflightReport
from domain.recipe import Recipe
from domain.training import StepLine, TrainerLine, TrainingJob
from trainer.contexts import Lesson
from trainer.material import Material
from trainer.memory import available_bytes, peak_bytes, reset_peak, used_bytes
from trainer.methods import plan_of
from trainer.model import Model, compute_dtype
from trainer.packing import BATCH_TOKENS
from trainer.preflight_work import AnswerLengths, decoding_steps, expected_lengths, work_of
from trainer.rollout import MAX_ROWS
from trainer.run import Run
from trainer.teacher import OWN_STATES_BYTES

TYPICAL_LESSONS = 64
"""Evenly spread over the job's lengths: what is timed."""
PROBE_NEW_TOKENS = 32
"""Decoded in the probe's answers: a long answer is more of the same."""


@dataclass(frozen=True)
class _Probe:
    material: Material
    begin_seconds: float
    line: StepLine


def estimate_cost(job: TrainingJob, model: Model, material: Material, report: PreflightReport) -> Cost:
    """Run a few steps of excerpts of `job` on `model`, which is spoilt for training by it.

    `material` is the whole job's; `report` has the lengths of answers where they were measured.
    """
    recipe, began = job.recipe, time.monotonic()
    peak = peak_bytes(model.device)

    # This step also warms the libraries up: it is for memory, the one after it for time.
    longest = _longest(material.lessons, recipe)
    before = used_bytes(model.device)
    reset_peak(model.device)
    _probe(_excerpt(job, longest, _short(recipe, batch_size=len(longest), rehearsal_share=0.0)), model)
    activations = peak_bytes(model.device) - before
    peak = max(peak, before + round(activations * _growth(material.lessons, len(longest), recipe)))

    reset_peak(model.device)
    # What reinvokes samples in its last steps alone: the probe's only step has to show it.
    share = recipe.rehearsal_share or (0.5 if recipe.reinvoke_steps else 0.0)
    typical = _excerpt(job, _typical(material.lessons), _short(recipe, rehearsal_share=share))
    probe = _probe(typical, model)
    peak = max(peak, peak_bytes(model.device) + _later_bytes(job, material))

    seconds = _seconds(probe, material, recipe, report)
    return Cost(
        seconds=sum(seconds.values()),
        **seconds,
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


def _probe(job: TrainingJob, model: Model) -> _Probe:
    """The first step of a job and what comes before it."""
    lines: list[TrainerLine] = []
    run = Run(job, model, lines.append)
    began = time.monotonic()
    run.begin()
    drawn = time.monotonic()
    run.take_step()
    return _Probe(run.material, drawn - began, next(line for line in lines if isinstance(line, StepLine)))


def _seconds(probe: _Probe, material: Material, recipe: Recipe, report: PreflightReport) -> dict[str, float]:
    """The fields of Cost that are extrapolated."""
    short, line = _short(recipe), probe.line
    steps = range(material.schedule.steps)
    targets = [len(target.tokens) for target in probe.material.targets or []]
    probed = AnswerLengths(
        student=line.response_tokens,
        teacher=sum(targets) / len(targets) if targets else line.response_tokens,
        rehearsed=short.max_rehearsal_tokens,
    )
    measured = work_of(probe.material, recipe, range(1), probed)
    planned = work_of(material, recipe, steps, expected_lengths(report, recipe))
    rollout = 0.0
    if planned.sampling_steps:
        probed_steps = decoding_steps(report, recipe, PROBE_NEW_TOKENS)
        longer = decoding_steps(report, recipe, recipe.max_new_tokens) / probed_steps
        rollout += line.rollout_seconds * longer * math.ceil(planned.sampling_steps / recipe.rollout_every)
    if plan_of(recipe).responses == "teacher":
        answers = len(material.lessons) / len(probe.material.lessons)
        length = recipe.max_new_tokens / short.max_new_tokens
        rollout += probe.begin_seconds * answers * length
    return {
        "rollout_seconds": rollout,
        "teacher_seconds": _scaled(line.teacher_seconds, planned.teacher, measured.teacher),
        "student_seconds": _scaled(line.student_seconds, planned.student, measured.student),
    }


def _scaled(seconds: float, planned: float, measured: float) -> float:
    return seconds * planned / measured if measured else 0.0


def _short(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with short answers and without measurements between steps."""
    short: dict[str, object] = {
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


def _growth(lessons: Sequence[Lesson], probed: int, recipe: Recipe) -> float:
    """Tokens of the training's largest forward pass with gradients over those of the probe's."""
    real = _largest_pass(lessons, recipe.batch_size * recipe.rollouts_per_prompt, recipe)
    return max(1.0, real / _largest_pass(lessons, probed, _short(recipe)))


def _largest_pass(lessons: Sequence[Lesson], sequences: int, recipe: Recipe) -> int:
    """Tokens of a pass over the longest `sequences`, where all answers are as long as they may be."""
    samples = plan_of(recipe).responses != "demonstration" and recipe.off_policy_share < 1
    answer = recipe.max_new_tokens if samples else 0
    sizes = [len(lesson.prompt) + max(len(lesson.response), answer) for lesson in lessons]
    sizes.sort(reverse=True)
    repeated = math.ceil(sequences / len(sizes)) * sizes
    return min(max(BATCH_TOKENS, sizes[0]), sum(sorted(repeated, reverse=True)[:sequences]))


def _later_bytes(job: TrainingJob, material: Material) -> int:
    """What grows after the probe: keys and values of longer answers, a frozen teacher's kept states."""
    recipe = job.recipe
    config = AutoConfig.from_pretrained(job.base_path).get_text_config()
    bytes_each = compute_dtype().itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = min(MAX_ROWS, recipe.rollout_every * recipe.batch_size * recipe.rollouts_per_prompt)
    longer = recipe.max_new_tokens - _short(recipe).max_new_tokens
    if plan_of(recipe).responses not in ("student", "teacher"):
        longer = recipe.max_rehearsal_tokens - _short(recipe).max_rehearsal_tokens
    cache = rows * longer * config.num_hidden_layers * 2 * heads * width * bytes_each
    if plan_of(recipe).loss != "divergence" or recipe.teacher not in ("parent", "base"):
        return cache
    kept = sum(len(lesson.response) for lesson in material.lessons) * config.hidden_size * bytes_each
    return cache + min(kept, OWN_STATES_BYTES)
