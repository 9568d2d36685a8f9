"""One stage's training: a skill taught on top of the version before it, resumable at every checkpoint."""

import gc
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.skill_data import StudiedSkill
from benchmarks.study import TrainingFigures
from domain.recipe import Recipe
from domain.rehearsal import general_prompts
from domain.training import PreflightLine, StepLine, TrainerLine, TrainingJob
from evaluation.benchmarks import Benchmark, OrdinaryPrompt
from trainer.run import train
from worker.job import rehearsal_prompts

VERSION = "version"
"""Folder of a finished stage's adapter, or of its full checkpoint."""
STEPS_FILE = "steps.jsonl"
PREFLIGHT_FILE = "preflight.json"
LAST_STEPS = 10
"""Over which a training's closing figures are averaged."""


@dataclass(frozen=True)
class Subject:
    """What all stages of a study share."""

    base: Path
    base_model: str
    skills: list[StudiedSkill]
    """In the order in which they are taught."""
    benchmarks: list[Benchmark]
    ordinary: list[OrdinaryPrompt]


def teach(
    subject: Subject,
    stage: int,
    recipe: Recipe,
    *,
    parent: Path | None,
    rollout_url: str | None,
    folder: Path,
    stop_requested: Callable[[], bool],
    progress: Callable[[str], None],
) -> Path:
    """The files of the version of 1-based `stage` on top of `parent`, trained into `folder` or found there.

    Rehearsal prompts are those that the product would give: ordinary ones and at most as many of earlier
    skills; the same seed and stage draw the same ones whatever the recipe. `rollout_url` is the server that
    draws the student's answers, None for the trainer itself. Raises TrainingRefused, and
    trainer.run.Interrupted after `stop_requested`: the next call then resumes from the checkpoint.
    """
    version, staged, checkpoints = folder / VERSION, folder / "staged", folder / "checkpoints"
    if version.exists():
        return version
    shutil.rmtree(staged, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [d.messages for skill in subject.skills[: stage - 1] for d in skill.teach.train]
    job = TrainingJob(
        update_id=str(folder),
        base_path=str(subject.base),
        base_model=subject.base_model,
        parent_adapter_path=None if parent is None else str(parent),
        rollout_url=rollout_url,
        recipe=recipe,
        skills=[subject.skills[stage - 1].teach],
        rehearsal=rehearsal_prompts(general_prompts(), earlier, f"{recipe.seed}:{stage}"),
        checkpoint_dir=str(checkpoints),
        output_dir=str(staged),
    )

    def emit(line: TrainerLine) -> None:
        if isinstance(line, PreflightLine):
            (folder / PREFLIGHT_FILE).write_text(line.model_dump_json())
        elif isinstance(line, StepLine):
            with (folder / STEPS_FILE).open("a") as file:
                file.write(line.model_dump_json() + "\n")
            if line.step % LAST_STEPS == 0 or line.step == line.steps:
                left = f"{line.eta_seconds:.0f} s left"
                progress(f"step {line.step} of {line.steps}, loss {line.loss:.3f}, {left}")

    train(job, emit, stop_requested)
    # Models are cycles of modules and hooks: without this two of them stand in memory while measuring.
    gc.collect()
    staged.rename(version)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return version


def training_figures(folder: Path) -> TrainingFigures:
    """Of a finished stage, from its files; a step that a resume repeated counts once."""
    lines = [StepLine.model_validate_json(line) for line in (folder / STEPS_FILE).read_text().splitlines()]
    steps = list({line.step: line for line in lines}.values())
    last = sorted(steps, key=lambda line: line.step)[-LAST_STEPS:]
    preflight = json.loads((folder / PREFLIGHT_FILE).read_text())
    return TrainingFigures(
        steps=len(steps),
        seconds=sum(line.rollout_seconds + line.teacher_seconds + line.student_seconds for line in steps),
        student_score=preflight["student_score"],
        teacher_score=preflight["teacher_score"],
        teacher_kl=_mean(line.teacher_kl for line in last),
        rehearsal_kl=_mean(line.rehearsal_kl for line in last),
        response_tokens=sum(line.response_tokens for line in last) / len(last),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
