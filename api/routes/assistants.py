"""Assistants: a base model, its line of versions and its aliases."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import Field
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.fields import Body, Name, Text
from api.idempotency import Creating
from api.lists import ListOf, Paging, listing
from api.replies import AssistantReply
from artifacts import base_models
from domain.version import CHAMPION
from registry import aliases, assistants, versions
from registry.tables import Assistant

router = APIRouter(tags=["assistants"])


class NewAssistant(Body):
    name: Name
    base_model: Annotated[Text, Field(min_length=1)]
    """A built-in name, an absolute folder or a hub id."""


@router.post("/v1/assistants", status_code=201, response_model=AssistantReply)
def create_assistant(body: NewAssistant, context: Ctx, team_id: Team, creation: Creating) -> Response:
    """Fetches the base model when it is not cached yet, which can take minutes."""
    stored = creation.replay()
    if stored is not None:
        return stored
    model = base_models.resolve(body.base_model, context.settings.cache_dir)
    context.prompts.tokenizer(body.base_model)  # refused here rather than at the first demonstration

    def work(session: Session) -> AssistantReply:
        assistant = assistants.create_assistant(
            session,
            team_id=team_id,
            name=body.name,
            base_model=body.base_model,
            parameter_count=model.parameter_count,
            context_window=model.context_window,
            actor=ACTOR,
        )
        return assistant_reply(session, assistant)

    response = creation.run(work)
    context.controller.nudge()
    return response


@router.get("/v1/assistants")
def list_assistants(
    session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[AssistantReply]:
    page = assistants.list_assistants(session, team_id, paging.after, paging.limit)
    return listing([assistant_reply(session, row) for row in page.rows], has_more=page.has_more)


@router.get("/v1/assistants/{assistant}")
def get_assistant(assistant: str, session: Reading, team_id: Team) -> AssistantReply:
    return assistant_reply(session, assistants.get_assistant(session, team_id, assistant))


def assistant_reply(session: Session, assistant: Assistant) -> AssistantReply:
    names = VersionNames(session, assistant)
    pointers = {alias.name: names(alias.version_id) for alias in aliases.list_aliases(session, assistant)}
    return AssistantReply(
        id=assistant.id,
        name=assistant.name,
        base_model=assistant.base_model,
        parameter_count=assistant.parameter_count,
        context_window=assistant.context_window,
        champion=pointers[CHAMPION],
        aliases=pointers,
        created_at=int(assistant.created_at),
    )


class VersionNames:
    """Names (`v3`) of an assistant's versions by their ids."""

    def __init__(self, session: Session, assistant: Assistant) -> None:
        self._session = session
        self._assistant = assistant
        self._known: dict[str, str] = {}

    def __call__(self, version_id: str) -> str:
        if version_id not in self._known:
            number = versions.get_version(self._session, self._assistant, version_id).number
            self._known[version_id] = f"v{number}"
        return self._known[version_id]

    def maybe(self, version_id: str | None) -> str | None:
        return None if version_id is None else self(version_id)
