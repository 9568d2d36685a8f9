"""The files of a fine-tuning job, read and checked, and how they get into a skill."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.context import ACTOR, Context
from api.fine_tuning_model import Taught
from domain.chat_file import parse_chat_file
from domain.demonstration import Demonstration
from domain.errors import DemonstrationsRejected, InvalidInput, LineError, NotFound
from domain.skill import DEFAULT_HOLDOUT_FRACTION, ExactGrader, Grader
from registry import assistants, demonstrations, files
from registry.tables import Assistant, File, Skill

MAX_DEMONSTRATIONS = 100_000
"""Of one file: they are checked in memory and stored in one transaction."""


@dataclass(frozen=True)
class Data:
    training: File
    validation: File | None
    train: list[Demonstration]
    holdout: list[Demonstration]
    """Of the validation file; without one, the skill holds a share of the training file out."""


def read(context: Context, team_id: str, taught: Taught, training: str, validation: str | None) -> Data:
    """Raises NotFound for an unknown file and DemonstrationsRejected naming every bad line; `param` of both
    is the field that names the file."""
    training_file, lines = _lines(context, team_id, taught, training, "training_file")
    if validation is None:
        return Data(training_file, None, [one for _, one in lines], [])
    validation_file, held_out = _lines(context, team_id, taught, validation, "validation_file")
    trained = {one.prompt_hash() for _, one in lines}
    shared = [
        LineError(line=number, param="messages", message="the training file has the same prompt")
        for number, one in held_out
        if one.prompt_hash() in trained
    ]
    if shared:
        raise _rejected(shared, "validation_file")
    return Data(training_file, validation_file, [one for _, one in lines], [one for _, one in held_out])


def store(session: Session, owner: Assistant, name: str, grader: Grader | None, data: Data) -> Skill:
    """The skill `name`, created if the assistant has none, with the data in it.

    Raises InvalidInput when the skill is graded otherwise than `grader` says, Conflict for a prompt that
    would be trained on and measured.
    """
    try:
        skill = assistants.get_skill(session, owner, name)
    except NotFound:
        skill = assistants.create_skill(
            session,
            owner,
            name=name,
            description=f"Created by a fine-tuning job from {data.training.filename}.",
            grader=grader or ExactGrader(),
            holdout_fraction=DEFAULT_HOLDOUT_FRACTION,
            actor=ACTOR,
        )
    if grader is not None and skill.grader != grader.model_dump(mode="json"):
        raise InvalidInput(
            f"The skill '{name}' is graded by {skill.grader}; PATCH the skill to change that.",
            param="metadata.grader",
        )
    if data.validation is None:
        demonstrations.accept_batch(session, owner, skill, data.train, actor=ACTOR)
    else:
        demonstrations.accept_batch(session, owner, skill, data.train, actor=ACTOR, split="train")
        demonstrations.accept_batch(session, owner, skill, data.holdout, actor=ACTOR, split="holdout")
    return skill


def _lines(
    context: Context, team_id: str, taught: Taught, file_id: str, param: str
) -> tuple[File, list[tuple[int, Demonstration]]]:
    with context.reads() as session:
        try:
            file = files.get_file(session, team_id, file_id)
        except NotFound as error:
            raise NotFound(error.message, param=param) from error
        if file.purpose != "fine-tune":
            raise InvalidInput(f"'{file_id}' is not for fine-tuning but {file.purpose}.", param=param)
        content = files.content(session, file)
    # Parsing and counting tokens takes seconds for a large file: outside of any transaction.
    try:
        lines = parse_chat_file(content)
        if len(lines) > MAX_DEMONSTRATIONS:
            raise InvalidInput(
                f"A file holds at most {MAX_DEMONSTRATIONS} demonstrations, not {len(lines)}.", param=param
            )
        context.prompts.require_fit(taught.base_model, taught.context_window, lines)
    except DemonstrationsRejected as error:
        raise _rejected(error.lines, param) from error
    return file, lines


def _rejected(lines: list[LineError], param: str) -> DemonstrationsRejected:
    error = DemonstrationsRejected(lines)
    error.param = param
    return error
