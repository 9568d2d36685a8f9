"""The assistants as OpenAI model objects: what `model` of a completion may say."""

from fastapi import APIRouter
from pydantic import BaseModel

from api.context import Reading, Team
from domain.errors import InvalidInput, NotFound
from domain.version import ModelName
from registry import aliases, assistants, versions
from registry.tables import Alias, Assistant

router = APIRouter(tags=["openai"])

_PAGE = 100


class ModelReply(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelReply]


@router.get("/v1/models")
def list_models(session: Reading, team_id: Team) -> ModelList:
    """Every assistant, then its aliases and versions; like OpenAI's list, not paged."""
    found: list[ModelReply] = []
    after: str | None = None
    while True:
        page = assistants.list_assistants(session, team_id, after, _PAGE)
        pointers = aliases.aliases_of(session, page.rows)
        made = versions.made_at(session, page.rows)
        for assistant in page.rows:
            found += _models_of(assistant, pointers[assistant.id], made[assistant.id])
        if not page.has_more:
            return ModelList(data=found)
        after = page.rows[-1].id


@router.get("/v1/models/{model}")
def get_model(model: str, session: Reading, team_id: Team) -> ModelReply:
    try:
        name = ModelName.parse(model)
        assistant = assistants.get_assistant(session, team_id, name.assistant)
        if assistant.name != name.assistant:
            raise NotFound("An id is no model name.")
        if name.alias is not None:
            created = aliases.get_alias(session, assistant, name.alias).updated_at
        else:
            created = versions.get_version(session, assistant, name.version or 0).created_at
    except (InvalidInput, NotFound) as error:
        raise model_not_found(model) from error
    return _model(model, created, assistant)


def model_not_found(model: str) -> NotFound:
    return NotFound(f"The model '{model}' does not exist.", param="model", code="model_not_found")


def _models_of(
    assistant: Assistant, pointers: list[Alias], made: list[tuple[int, float]]
) -> list[ModelReply]:
    found = [_model(assistant.name, assistant.created_at, assistant)]
    for alias in pointers:
        found.append(_model(f"{assistant.name}@{alias.name}", alias.updated_at, assistant))
    for number, created_at in made:
        found.append(_model(f"{assistant.name}@v{number}", created_at, assistant))
    return found


def _model(id: str, created: float, assistant: Assistant) -> ModelReply:
    return ModelReply(id=id, created=int(created), owned_by=assistant.team_id)
