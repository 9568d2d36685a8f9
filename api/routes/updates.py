"""Updates: accepted at once, run by a worker, cancelled, paused and resumed."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import Field, JsonValue, ValidationError
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from api.context import ACTOR, Ctx, Reading, Team
from api.errors import invalid_input
from api.fields import Body, Text
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import UpdateReply
from api.routes.assistants import VersionNames
from domain.errors import InvalidInput
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.settings import Settings
from domain.update import Publish
from registry import assistants, updates
from registry.tables import Assistant, Update

router = APIRouter(tags=["updates"])


class NewUpdate(Body):
    skills: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    """Names; default: every skill with demonstrations that were not taught yet."""
    recipe: Annotated[dict[str, JsonValue], Field(default_factory=dict)]
    """Fields that differ from what the base model gets by default."""
    gate: GateRules = GateRules()
    publish: Publish = "auto"


@router.post("/v1/assistants/{assistant}/updates", status_code=202, response_model=UpdateReply)
def create_update(
    assistant: str, body: NewUpdate, context: Ctx, team_id: Team, creation: Creating
) -> Response:
    accepted: list[str] = []

    def work(session: Session) -> UpdateReply:
        owner = assistants.get_assistant(session, team_id, assistant)
        update = updates.create_update(
            session,
            owner,
            skills=body.skills,
            recipe=recipe_for(context.settings, owner.parameter_count, body.recipe),
            gate=body.gate,
            publish=body.publish,
            actor=ACTOR,
        )
        accepted.append(update.id)
        return update_reply(session, owner, update)

    response = creation.run(work, status_code=202)
    for update_id in accepted:
        # After the reply: a frozen broker costs two seconds, and the row is already committed.
        response.background = BackgroundTask(context.producer.nudge, update_id)
    return response


@router.get("/v1/assistants/{assistant}/updates")
def list_updates(
    assistant: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[UpdateReply]:
    owner = assistants.get_assistant(session, team_id, assistant)
    page = updates.list_updates(session, owner, paging.after, paging.limit)
    return listing(_update_replies(session, owner, page.rows), has_more=page.has_more)


@router.get("/v1/updates/{update}")
def get_update(update: str, session: Reading, team_id: Team) -> UpdateReply:
    row = updates.get_update(session, team_id, update)
    return update_reply(session, assistants.get_assistant(session, team_id, row.assistant_id), row)


@router.post("/v1/updates/{update}/cancel")
def cancel_update(update: str, context: Ctx, team_id: Team) -> UpdateReply:
    """Durable once answered: the update never publishes. A running one ends within a heartbeat."""
    with context.sessions.begin() as session:
        row = updates.request_cancel(session, updates.get_update(session, team_id, update), ACTOR)
        return update_reply(session, assistants.get_assistant(session, team_id, row.assistant_id), row)


@router.post("/v1/updates/{update}/pause")
def pause_update(update: str, context: Ctx, team_id: Team) -> UpdateReply:
    """A running update writes a checkpoint first."""
    with context.sessions.begin() as session:
        row = updates.request_pause(session, updates.get_update(session, team_id, update), ACTOR)
        return update_reply(session, assistants.get_assistant(session, team_id, row.assistant_id), row)


@router.post("/v1/updates/{update}/resume", response_model=UpdateReply)
def resume_update(update: str, context: Ctx, team_id: Team) -> Response:
    with context.sessions.begin() as session:
        row = updates.resume(session, updates.get_update(session, team_id, update), ACTOR)
        reply = update_reply(session, assistants.get_assistant(session, team_id, row.assistant_id), row)
    return Response(
        reply.model_dump_json(),
        media_type="application/json",
        background=BackgroundTask(context.producer.nudge, reply.id),
    )


def update_reply(session: Session, assistant: Assistant, update: Update) -> UpdateReply:
    [reply] = _update_replies(session, assistant, [update])
    return reply


def _update_replies(session: Session, assistant: Assistant, rows: Sequence[Update]) -> list[UpdateReply]:
    names = VersionNames(session, [id for row in rows for id in (row.parent_version_id, row.version_id)])
    return [_update_reply(names, assistant, row) for row in rows]


def _update_reply(names: VersionNames, assistant: Assistant, update: Update) -> UpdateReply:
    return UpdateReply(
        id=update.id,
        assistant=assistant.name,
        status=update.status,
        phase=update.phase,
        skills=update.skills,
        recipe=update.recipe,
        gate=update.gate,
        publish="hold" if update.publish == "hold" else "auto",
        parent_version=names.maybe(update.parent_version_id),
        version=names.maybe(update.version_id),
        verdict=update.verdict,
        error=update.error,
        cancel_requested=update.cancel_requested,
        pause_requested=update.pause_requested,
        created_at=int(update.created_at),
        started_at=None if update.started_at is None else int(update.started_at),
        finished_at=None if update.finished_at is None else int(update.finished_at),
    )


def recipe_for(
    settings: Settings, parameter_count: int, given: dict[str, JsonValue], *, under: str = "recipe"
) -> Recipe:
    """The default of a base model of that size with what is `given` in the request's field `under`.

    Raises InvalidInput naming the field, also when no engine here could serve what the recipe trains.
    """
    try:
        recipe = Recipe.completed(given, parameter_count)
    except ValidationError as error:
        raise invalid_input(error, under=under) from error
    _require_servable(settings, recipe, param=f"{under}.lora_rank")
    return recipe


def _require_servable(settings: Settings, recipe: Recipe, *, param: str) -> None:
    """Raises InvalidInput for a recipe whose version no engine here could serve."""
    if recipe.version_kind == "full" and not settings.starts_engines:
        raise InvalidInput(
            f"{param}: 0 makes a whole model, which needs an engine started for it, and those at "
            "RATCHET_ENGINE_URL are not Ratchet's to start. Use 1 or more, or let `ratchet up` run engines.",
            param=param,
            code="full_version_not_servable",
        )
    max_rank = settings.adapter_rank_limit
    if max_rank is not None and recipe.lora_rank > max_rank:
        raise InvalidInput(
            f"{param}: {recipe.lora_rank} is above the {max_rank} that the inference engine serves "
            "(RATCHET_ENGINE_MAX_RANK).",
            param=param,
            code="rank_not_servable",
        )
