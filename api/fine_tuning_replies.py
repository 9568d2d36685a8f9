"""Updates told as OpenAI's fine-tuning jobs."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.fine_tuning_request import METHODS
from api.lists import Listed
from api.routes.assistants import VersionNames
from domain.measurement import Verdict
from domain.recipe import Recipe
from domain.update import FINISHED, Phase, Status
from registry import assistants, fine_tuning
from registry.fine_tuning import Progress
from registry.tables import Assistant, Event, FineTuningJob, Update

_LEVELS: dict[str, Literal["info", "warn", "error"]] = {"info": "info", "warning": "warn", "error": "error"}
_TYPES = {method: name for name, method in METHODS.items()}
"""The recipe's method -> `method.type`."""
_TOLD_ELSEWHERE = frozenset({"method", "seed", "num_epochs", "batch_size", "learning_rate"})


class HyperparametersReply(BaseModel):
    n_epochs: int | float
    batch_size: int
    learning_rate_multiplier: float
    """Of the learning rate that the base model gets by default, for an adapter or for all weights."""


class JobReply(Listed):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: dict[str, Any] | None
    """{code, message, param} of a failed job."""
    fine_tuned_model: str | None
    """`assistant@v3` once it is published, whatever its verdict; whether `assistant` means it now is the
    verdict's matter."""
    finished_at: int | None
    hyperparameters: HyperparametersReply
    model: str
    """The assistant that is taught."""
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[str]
    """Always empty."""
    metadata: dict[str, str]
    method: dict[str, Any]
    user_provided_suffix: str | None
    update: str
    """The update that the job is: `/v1/updates/{update}`."""
    skills: list[str]
    verdict: Verdict | None
    """Ratchet's own: whether the version went live, and why not."""


class JobEventReply(Listed):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointReply(Listed):
    """There are none: a checkpoint of a training holds no version that could be served."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"


def job_replies(session: Session, team_id: str, jobs: Sequence[FineTuningJob]) -> list[JobReply]:
    updates = fine_tuning.updates_of(session, jobs)
    owners = {
        id: assistants.get_assistant(session, team_id, id)
        for id in {update.assistant_id for update in updates.values()}
    }
    names = VersionNames(session, [update.version_id for update in updates.values()])
    progress = fine_tuning.progress_of(session, list(updates))
    return [
        _job_reply(
            job, update, owners[update.assistant_id], names.maybe(update.version_id), progress.get(update.id)
        )
        for job in jobs
        for update in [updates[job.update_id]]
    ]


def event_reply(event: Event) -> JobEventReply:
    data = dict(event.data)
    if event.type == "metrics":
        data |= {"train_loss": data["loss"], "total_steps": data["steps"]}
    return JobEventReply(
        id=f"ftevent_{event.update_id.removeprefix('upd_')}_{event.seq}",
        created_at=int(event.created_at),
        level=_LEVELS[event.level],
        message=event.message,
        type="metrics" if event.type == "metrics" else "message",
        data=data,
    )


def _job_reply(
    job: FineTuningJob, update: Update, owner: Assistant, version: str | None, progress: Progress | None
) -> JobReply:
    recipe = Recipe.model_validate(update.recipe)
    default = Recipe.completed({"lora_rank": recipe.lora_rank}, owner.parameter_count)
    plain = HyperparametersReply(
        n_epochs=int(recipe.num_epochs) if recipe.num_epochs == int(recipe.num_epochs) else recipe.num_epochs,
        batch_size=recipe.batch_size,
        learning_rate_multiplier=round(recipe.learning_rate / default.learning_rate, 6),
    )
    ended = Status(update.status) in FINISHED
    return JobReply(
        id=job.id,
        created_at=int(job.created_at),
        error=update.error,
        fine_tuned_model=None if version is None else f"{owner.name}@{version}",
        finished_at=None if update.finished_at is None else int(update.finished_at),
        hyperparameters=plain,
        model=owner.name,
        organization_id=job.team_id,
        result_files=[] if job.result_file is None else [job.result_file],
        seed=recipe.seed,
        status=update.status,
        trained_tokens=progress.tokens if ended and progress is not None else None,
        training_file=job.training_file,
        validation_file=job.validation_file,
        estimated_finish=_estimate(update, progress),
        integrations=[],
        metadata=job.labels,
        method=_method(recipe, Recipe.default_for(owner.parameter_count), plain),
        user_provided_suffix=job.suffix,
        update=update.id,
        skills=update.skills,
        verdict=update.verdict,
    )


def _estimate(update: Update, progress: Progress | None) -> int | None:
    """When training was last expected to end: evaluation and gate come after it."""
    running = update.status == Status.RUNNING and update.phase == Phase.TRAINING
    return int(progress.finish_at) if running and progress is not None else None


def _method(recipe: Recipe, default: Recipe, plain: HyperparametersReply) -> dict[str, Any]:
    """With every hyperparameter that differs from the default."""
    usual = default.model_dump(mode="json")
    changed = {
        name: value
        for name, value in recipe.model_dump(mode="json").items()
        if name not in _TOLD_ELSEWHERE and value != usual[name]
    }
    kind = _TYPES[recipe.method]
    return {"type": kind, kind: {"hyperparameters": {**plain.model_dump(), **changed}}}
