"""OpenAI's fine-tuning jobs: an update of an assistant, taught from an uploaded file."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from api import fine_tuning_data, fine_tuning_model
from api.context import ACTOR, Ctx, Reading, Team
from api.fine_tuning_replies import CheckpointReply, JobEventReply, JobReply, event_reply, job_replies
from api.fine_tuning_request import NewJob
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.openai_route import OpenAIRoute
from domain.errors import InvalidInput
from domain.measurement import GateRules
from registry import events, fine_tuning, updates
from registry.tables import FineTuningJob

router = APIRouter(tags=["openai"], route_class=OpenAIRoute)

JOBS = "/v1/fine_tuning/jobs"
JOB = JOBS + "/{job}"


@router.post(JOBS, response_model=JobReply)
def create_job(body: NewJob, context: Ctx, team_id: Team, creation: Creating) -> Response:
    """Store the file's demonstrations in a skill and queue the update that teaches them.

    The skill is `metadata.skill`, else `suffix`, else named after the file; a new one is graded as
    `metadata.grader` says, else `exact`. Files are checked before the reply: the files of a job that was
    accepted are valid.
    """
    stored = creation.replay()
    if stored is not None:
        return stored
    taught = fine_tuning_model.find(context, team_id, body.model, body.suffix)
    recipe = body.recipe(context.settings, taught.parameter_count)
    grader = body.grader()
    data = fine_tuning_data.read(context, team_id, taught, body.training_file, body.validation_file)
    skill_name = body.skill(data.training.filename, suffix_is_assistant=taught.is_new)
    accepted: list[str] = []

    def work(session: Session) -> JobReply:
        owner = fine_tuning_model.owner(session, team_id, taught)
        skill = fine_tuning_data.store(session, owner, skill_name, grader, data)
        update = updates.create_update(
            session,
            owner,
            skills=[skill.name],
            recipe=recipe,
            gate=GateRules(),
            publish="auto",
            actor=ACTOR,
        )
        job = fine_tuning.create_job(
            session,
            update,
            training_file=data.training,
            validation_file=data.validation,
            suffix=body.suffix,
            labels=body.metadata or {},
            actor=ACTOR,
        )
        accepted.append(update.id)
        return _reply(session, team_id, job)

    response = creation.run(work, status_code=200)
    if taught.is_new:
        context.controller.nudge()
    for update_id in accepted:
        # After the reply: a frozen broker costs two seconds, and the row is already committed.
        response.background = BackgroundTask(context.producer.nudge, update_id)
    return response


async def _metadata_filter(request: Request) -> dict[str, str]:
    """`?metadata[key]=value`, any number of them."""
    found = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata"):
            continue
        match = re.fullmatch(r"metadata\[([^\]\0]{1,64})\]", name)
        if match is None:
            raise InvalidInput("Filter by metadata[key]=value.", param="metadata")
        found[match.group(1)] = value
    return found


@router.get(JOBS)
def list_jobs(
    session: Reading,
    team_id: Team,
    paging: Annotated[Paging, Depends()],
    labels: Annotated[dict[str, str], Depends(_metadata_filter)],
) -> ListOf[JobReply]:
    """Newest first. `?metadata[key]=value` keeps the jobs that carry it."""
    page = fine_tuning.list_jobs(session, team_id, paging.after, paging.limit, labels)
    return listing(job_replies(session, team_id, page.rows), has_more=page.has_more)


@router.get(JOB)
def get_job(job: str, session: Reading, team_id: Team) -> JobReply:
    return _reply(session, team_id, fine_tuning.get_job(session, team_id, job))


@router.post(JOB + "/cancel")
def cancel_job(job: str, context: Ctx, team_id: Team) -> JobReply:
    """Durable once answered: the job never publishes. A running one ends within a heartbeat."""
    with context.sessions.begin() as session:
        row = fine_tuning.get_job(session, team_id, job)
        updates.request_cancel(session, updates.get_update(session, team_id, row.update_id), ACTOR)
        return _reply(session, team_id, row)


@router.post(JOB + "/pause")
def pause_job(job: str, context: Ctx, team_id: Team) -> JobReply:
    """A running one writes a checkpoint first."""
    with context.sessions.begin() as session:
        row = fine_tuning.get_job(session, team_id, job)
        updates.request_pause(session, updates.get_update(session, team_id, row.update_id), ACTOR)
        return _reply(session, team_id, row)


@router.post(JOB + "/resume", response_model=JobReply)
def resume_job(job: str, context: Ctx, team_id: Team) -> Response:
    with context.sessions.begin() as session:
        row = fine_tuning.get_job(session, team_id, job)
        updates.resume(session, updates.get_update(session, team_id, row.update_id), ACTOR)
        reply = _reply(session, team_id, row)
    return Response(
        reply.model_dump_json(),
        media_type="application/json",
        background=BackgroundTask(context.producer.nudge, reply.update),
    )


@router.get(JOB + "/events")
def list_job_events(
    job: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[JobEventReply]:
    """Newest first: those of the update."""
    row = fine_tuning.get_job(session, team_id, job)
    update = updates.get_update(session, team_id, row.update_id)
    found = events.newest_events(session, update, _seq(paging.after), paging.limit + 1)
    return listing(
        [event_reply(event) for event in found[: paging.limit]], has_more=len(found) > paging.limit
    )


@router.get(JOB + "/checkpoints")
def list_job_checkpoints(
    job: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[CheckpointReply]:
    """Always empty: what a training writes to go on from cannot be served."""
    fine_tuning.get_job(session, team_id, job)
    return listing([], has_more=False)


def _seq(after: str | None) -> int | None:
    if after is None:
        return None
    match = re.fullmatch(r"ftevent_\w+_([0-9]{1,12})", after)
    if match is None:
        raise InvalidInput(f"'{after}' is not the id of an event.", param="after")
    return int(match.group(1))


def _reply(session: Session, team_id: str, job: FineTuningJob) -> JobReply:
    [reply] = job_replies(session, team_id, [job])
    return reply
