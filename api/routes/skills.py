"""Skills of an assistant: a name and a grader."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import Field, TypeAdapter
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.fields import Body, Name, Text
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import SkillReply
from domain.skill import DEFAULT_HOLDOUT_FRACTION, Grader
from registry import assistants
from registry.tables import Assistant, Skill

router = APIRouter(tags=["skills"])
_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)

HoldoutFraction = Annotated[float, Field(ge=0, le=0.9)]


class NewSkill(Body):
    name: Name
    description: Text = ""
    grader: Grader
    holdout_fraction: HoldoutFraction = DEFAULT_HOLDOUT_FRACTION
    """Share of the prompts that is kept for measuring and never trained on."""


class SkillChange(Body):
    description: Text | None = None
    grader: Grader | None = None
    holdout_fraction: HoldoutFraction | None = None


@router.post("/v1/assistants/{assistant}/skills", status_code=201, response_model=SkillReply)
def create_skill(assistant: str, body: NewSkill, team_id: Team, creation: Creating) -> Response:
    def work(session: Session) -> SkillReply:
        owner = assistants.get_assistant(session, team_id, assistant)
        skill = assistants.create_skill(
            session,
            owner,
            name=body.name,
            description=body.description,
            grader=body.grader,
            holdout_fraction=body.holdout_fraction,
            actor=ACTOR,
        )
        return _skill_reply(owner, skill)

    return creation.run(work)


@router.get("/v1/assistants/{assistant}/skills")
def list_skills(
    assistant: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[SkillReply]:
    owner = assistants.get_assistant(session, team_id, assistant)
    page = assistants.list_skills(session, owner, paging.after, paging.limit)
    return listing([_skill_reply(owner, row) for row in page.rows], has_more=page.has_more)


@router.get("/v1/assistants/{assistant}/skills/{skill}")
def get_skill(assistant: str, skill: str, session: Reading, team_id: Team) -> SkillReply:
    owner = assistants.get_assistant(session, team_id, assistant)
    return _skill_reply(owner, assistants.get_skill(session, owner, skill))


@router.patch("/v1/assistants/{assistant}/skills/{skill}")
def update_skill(assistant: str, skill: str, body: SkillChange, context: Ctx, team_id: Team) -> SkillReply:
    """Changes the fields that are given and not null."""
    with context.sessions.begin() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        row = assistants.update_skill(
            session,
            assistants.get_skill(session, owner, skill),
            description=body.description,
            grader=body.grader,
            holdout_fraction=body.holdout_fraction,
            actor=ACTOR,
        )
        return _skill_reply(owner, row)


def _skill_reply(assistant: Assistant, skill: Skill) -> SkillReply:
    return SkillReply(
        id=skill.id,
        assistant=assistant.name,
        name=skill.name,
        description=skill.description,
        grader=_GRADER.validate_python(skill.grader),
        holdout_fraction=skill.holdout_fraction,
        demonstrations={"train": skill.train_demonstrations, "holdout": skill.holdout_demonstrations},
        created_at=int(skill.created_at),
    )
