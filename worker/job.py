"""The trainer's job, built from the registry once per update and kept in the update's work folder.

Later claims take the kept one: demonstrations that were accepted in between must not change what a
checkpoint is resumed into (the trainer ignores checkpoints of another job).
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from domain.demonstration import Demonstration, Message
from domain.errors import TrainingRefused
from domain.recipe import Recipe
from domain.rehearsal import general_prompts
from domain.skill import Grader
from domain.training import SkillToTeach, TrainingJob
from registry.assistants import get_assistant, get_skill
from registry.demonstrations import holdout_items, taught_prompts
from registry.updates import demonstrations_of, get_update
from registry.versions import get_version
from serving.validation import CONFIG
from worker.brief import Brief

_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)


def build_job(session: Session, brief: Brief) -> TrainingJob:
    """Everything but the paths, which belong to one claim: see `prepare_job`."""
    assistant = get_assistant(session, brief.team_id, brief.assistant_id)
    taught = demonstrations_of(session, get_update(session, brief.team_id, brief.update_id))
    skills = []
    for name in brief.skills:
        skill = get_skill(session, assistant, name)
        skills.append(
            SkillToTeach(
                name=skill.name,
                grader=_GRADER.validate_python(skill.grader),
                train=[Demonstration.model_validate(row.body) for row in taught if row.skill_id == skill.id],
                holdout=[Demonstration.model_validate(row.body) for row in holdout_items(session, skill)],
            )
        )
    parent = get_version(session, assistant, brief.parent_id)
    return TrainingJob(
        update_id=brief.update_id,
        base_path="",
        base_model=brief.base_model,
        parent_adapter_path=None,
        recipe=brief.recipe,
        skills=skills,
        rehearsal=rehearsal_prompts(
            general_prompts(), taught_prompts(session, assistant, parent, brief.skills), brief.update_id
        ),
        checkpoint_dir="",
        output_dir="",
    )


def prepare_job(
    folder: Path,
    build: Callable[[], TrainingJob],
    *,
    base: Path,
    parent_adapter: Path | None,
    output: Path,
    rollout_url: str | None,
) -> Path:
    """The job file for one claim, in `folder`, the update's work folder."""
    job_file = folder / "job.json"
    job = TrainingJob.model_validate_json(job_file.read_bytes()) if job_file.exists() else build()
    job = job.model_copy(
        update={
            "base_path": str(base),
            "parent_adapter_path": None if parent_adapter is None else str(parent_adapter),
            "checkpoint_dir": str(folder / "checkpoints"),
            "output_dir": str(output),
            "rollout_url": rollout_url,
        }
    )
    staged = folder / "job.json.staged"
    with staged.open("w", encoding="utf-8") as file:
        file.write(job.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    staged.replace(job_file)
    return job_file


def rehearsal_prompts(
    general: list[list[Message]], taught: list[list[Message]], seed: str
) -> list[list[Message]]:
    """General prompts and at most as many of earlier skills, drawn by `seed`.

    The trainer draws uniformly from the list: without a bound a line of many skills would hardly rehearse
    ordinary answers, and a skill's format would leak into them.
    """
    if len(taught) > len(general):
        taught = random.Random(seed).sample(taught, len(general))
    return general + taught


def check_merged_rank(recipe: Recipe, parent: Path | None, max_rank: int | None) -> None:
    """Raises TrainingRefused before anything is trained whose adapter, the parent's merged into it, would be
    above what the inference engine serves."""
    if max_rank is None or parent is None or recipe.lora_rank == 0 or recipe.parent_adapter != "merge":
        return
    before = int(json.loads((parent / CONFIG).read_text(encoding="utf-8"))["r"])
    if before + recipe.lora_rank > max_rank:
        raise TrainingRefused(
            f"recipe.parent_adapter: merging the parent's rank {before} with {recipe.lora_rank} is above the "
            f"{max_rank} that the inference engine serves (RATCHET_ENGINE_MAX_RANK). Use 'continue', or a "
            "smaller lora_rank.",
            param="recipe.parent_adapter",
            code="rank_not_servable",
        )
