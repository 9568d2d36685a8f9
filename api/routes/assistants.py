"""Assistants: a base model, its line of versions and its aliases."""

from collections.abc import Iterable, Sequence
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
    description: Text = ""


class AssistantChange(Body):
    name: Name | None = None
    description: Text | None = None


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
            description=body.description,
        )
        return _assistant_reply(session, assistant)

    response = creation.run(work)
    context.controller.nudge()
    return response


@router.get("/v1/assistants")
def list_assistants(
    session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[AssistantReply]:
    page = assistants.list_assistants(session, team_id, paging.after, paging.limit)
    return listing(_assistant_replies(session, page.rows), has_more=page.has_more)


@router.get("/v1/assistants/{assistant}")
def get_assistant(assistant: str, session: Reading, team_id: Team) -> AssistantReply:
    return _assistant_reply(session, assistants.get_assistant(session, team_id, assistant))


@router.patch("/v1/assistants/{assistant}")
def update_assistant(assistant: str, body: AssistantChange, context: Ctx, team_id: Team) -> AssistantReply:
    """Changes the fields that are given and not null. Under a new name it is another `model`: clients that
    still send the old one get 404."""
    with context.sessions.begin() as session:
        row = assistants.update_assistant(
            session,
            assistants.get_assistant(session, team_id, assistant),
            name=body.name,
            description=body.description,
            actor=ACTOR,
        )
        reply = _assistant_reply(session, row)
    context.controller.nudge()
    return reply


class VersionNames:
    """Names (`v3`) of versions by their ids, read at once."""

    def __init__(self, session: Session, ids: Iterable[str | None]) -> None:
        self._numbers = versions.numbers_of(session, ids)

    def __call__(self, version_id: str) -> str:
        return f"v{self._numbers[version_id]}"

    def maybe(self, version_id: str | None) -> str | None:
        return None if version_id is None else self(version_id)


def _assistant_reply(session: Session, assistant: Assistant) -> AssistantReply:
    [reply] = _assistant_replies(session, [assistant])
    return reply


def _assistant_replies(session: Session, rows: Sequence[Assistant]) -> list[AssistantReply]:
    pointers = aliases.aliases_of(session, rows)
    names = VersionNames(session, [alias.version_id for found in pointers.values() for alias in found])
    replies = []
    for assistant in rows:
        named = {alias.name: names(alias.version_id) for alias in pointers[assistant.id]}
        replies.append(
            AssistantReply(
                id=assistant.id,
                name=assistant.name,
                description=assistant.description,
                base_model=assistant.base_model,
                parameter_count=assistant.parameter_count,
                context_window=assistant.context_window,
                champion=named[CHAMPION],
                aliases=named,
                created_at=int(assistant.created_at),
            )
        )
    return replies
