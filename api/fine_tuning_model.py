"""What `model` of a fine-tuning job means: an assistant to teach, or a base model to make one of."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.context import ACTOR, Context
from artifacts import base_models
from artifacts.base_models import BUILT_IN
from domain.errors import AlreadyExists, InvalidInput, NotFound
from domain.version import CHAMPION, ModelName
from registry import aliases, assistants, versions
from registry.tables import Assistant


@dataclass(frozen=True)
class Taught:
    """The assistant that a job teaches."""

    assistant_id: str | None
    """None: the job creates it."""
    name: str
    base_model: str
    parameter_count: int
    context_window: int
    """Tokens."""

    @property
    def is_new(self) -> bool:
        return self.assistant_id is None


def find(context: Context, team_id: str, model: str, suffix: str | None) -> Taught:
    """An assistant by `assistant` or by the name of its champion; or a new one, named `suffix`, when `model`
    is a base model. Base models are the built-in ones and those that an assistant of the team has.

    Raises NotFound, InvalidInput, UnknownBaseModel.
    """
    with context.reads() as session:
        found = _assistant(session, team_id, model)
        if found is not None:
            return Taught(found.id, found.name, found.base_model, found.parameter_count, found.context_window)
        if model not in BUILT_IN and not assistants.has_base_model(session, team_id, model):
            raise NotFound(
                f"The model '{model}' does not exist. `model` names an assistant; POST /v1/assistants "
                "creates one on any base model.",
                param="model",
                code="model_not_found",
            )
    if suffix is None:
        raise InvalidInput(
            f"'{model}' is a base model: give a 'suffix' to create an assistant of that name on it, or name "
            "an assistant.",
            param="suffix",
            code="suffix_needed",
        )
    base = base_models.resolve(model, context.settings.cache_dir)
    return Taught(None, suffix, model, base.parameter_count, base.context_window)


def owner(session: Session, team_id: str, taught: Taught) -> Assistant:
    """The assistant's row, created if it is new. Raises AlreadyExists(param="suffix")."""
    if taught.assistant_id is not None:
        return assistants.get_assistant(session, team_id, taught.assistant_id)
    try:
        return assistants.create_assistant(
            session,
            team_id=team_id,
            name=taught.name,
            base_model=taught.base_model,
            parameter_count=taught.parameter_count,
            context_window=taught.context_window,
            actor=ACTOR,
        )
    except AlreadyExists as error:
        raise AlreadyExists(
            f"There is already an assistant '{taught.name}': name it as 'model' to teach it more.",
            param="suffix",
        ) from error


def _assistant(session: Session, team_id: str, model: str) -> Assistant | None:
    """Raises InvalidInput for a version that an update could not start from, NotFound for one of none."""
    try:
        name = ModelName.parse(model)
        found = assistants.get_assistant(session, team_id, name.assistant)
    except (InvalidInput, NotFound):
        return None
    if found.name != name.assistant:  # its id, which is no model name
        return None
    champion = aliases.get_alias(session, found, CHAMPION).version_id
    try:
        if name.version is not None:
            wanted = versions.get_version(session, found, name.version).id
        else:
            wanted = aliases.get_alias(session, found, name.alias or CHAMPION).version_id
    except NotFound as error:
        raise NotFound(error.message, param="model", code="model_not_found") from error
    if wanted != champion:
        numbers = versions.numbers_of(session, [wanted, champion])
        raise InvalidInput(
            f"An update starts from the champion, v{numbers[champion]}; to start from v{numbers[wanted]}, "
            "roll back to it first.",
            param="model",
            code="not_champion",
        )
    return found
