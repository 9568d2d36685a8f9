"""Assistants and their skills."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exists, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.errors import AlreadyExists, Conflict, NotFound
from domain.ids import new_id
from domain.skill import Grader
from domain.version import CHAMPION
from registry import aliases, audit
from registry.paging import Page, read_page
from registry.session import db_now, violates_unique
from registry.tables import Assistant, DemonstrationRow, Skill, Version


def create_assistant(
    session: Session,
    *,
    team_id: str,
    name: str,
    base_model: str,
    parameter_count: int,
    context_window: int,
    actor: str,
    description: str = "",
) -> Assistant:
    """An assistant whose champion is v0, the bare base model.

    `context_window` is in tokens. Raises AlreadyExists(param="name").
    """
    now = db_now(session)
    assistant = Assistant(
        id=new_id("asst"),
        team_id=team_id,
        name=name,
        description=description,
        base_model=base_model,
        parameter_count=parameter_count,
        context_window=context_window,
        next_version=1,
        created_at=now,
    )
    with _unique_name(session, f"There is already an assistant named '{name}'."):
        session.add(assistant)
        session.flush()
    base = Version(
        id=new_id("ver"),
        team_id=team_id,
        assistant_id=assistant.id,
        number=0,
        kind="base",
        served_name=base_model,
        created_at=now,
    )
    session.add(base)
    session.flush()
    audit.record(
        session,
        team_id=team_id,
        actor=actor,
        action="assistant.create",
        object_id=assistant.id,
        data={"name": name, "base_model": base_model},
    )
    aliases.move_alias(
        session, assistant, CHAMPION, base, kind="create", reason="", actor=actor, expected_revision=None
    )
    return assistant


def get_assistant(session: Session, team_id: str, name_or_id: str) -> Assistant:
    """Raises NotFound, also for another team's assistant."""
    found = session.scalars(
        select(Assistant)
        .where(Assistant.team_id == team_id, or_(Assistant.id == name_or_id, Assistant.name == name_or_id))
        # A name may be spelled like another's id; the id wins.
        .order_by((Assistant.id == name_or_id).desc())
    ).first()
    if found is None:
        raise NotFound(f"There is no assistant '{name_or_id}'.", param="assistant")
    return found


def list_assistants(session: Session, team_id: str, after: str | None, limit: int) -> Page[Assistant]:
    return read_page(
        session,
        select(Assistant).where(Assistant.team_id == team_id),
        key=Assistant.id,
        order=[Assistant.created_at, Assistant.id],
        after=after,
        limit=limit,
    )


def has_base_model(session: Session, team_id: str, base_model: str) -> bool:
    """Whether an assistant of the team stands on it."""
    found = exists().where(Assistant.team_id == team_id, Assistant.base_model == base_model)
    return session.scalar(select(found)) or False


def update_assistant(
    session: Session,
    assistant: Assistant,
    *,
    name: str | None = None,
    description: str | None = None,
    actor: str,
) -> Assistant:
    """Change what is given. Under a new name it answers at once; the old one is then unknown.

    Raises AlreadyExists(param="name").
    """
    assistant = session.scalars(
        select(Assistant)
        .where(Assistant.id == assistant.id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()
    changes: dict[str, object] = {}
    if name is not None and name != assistant.name:
        changes["name"] = name
    if description is not None and description != assistant.description:
        changes["description"] = assistant.description = description
    if changes:
        with _unique_name(session, f"There is already an assistant named '{name}'."):
            assistant.name = assistant.name if name is None else name
            session.flush()
        audit.record(
            session,
            team_id=assistant.team_id,
            actor=actor,
            action="assistant.update",
            object_id=assistant.id,
            data=changes,
        )
    return assistant


def create_skill(
    session: Session,
    assistant: Assistant,
    *,
    name: str,
    description: str,
    grader: Grader,
    holdout_fraction: float,
    actor: str,
) -> Skill:
    """`holdout_fraction` is the share of prompts kept for measuring. Raises AlreadyExists(param="name")."""
    skill = Skill(
        id=new_id("skill"),
        team_id=assistant.team_id,
        assistant_id=assistant.id,
        name=name,
        description=description,
        grader=grader.model_dump(mode="json"),
        holdout_fraction=holdout_fraction,
        created_at=db_now(session),
    )
    with _unique_name(session, f"The assistant already has a skill named '{name}'."):
        session.add(skill)
        session.flush()
    audit.record(
        session,
        team_id=assistant.team_id,
        actor=actor,
        action="skill.create",
        object_id=skill.id,
        data={"name": name, "grader": skill.grader, "holdout_fraction": holdout_fraction},
    )
    return skill


def get_skill(session: Session, assistant: Assistant, name_or_id: str) -> Skill:
    """Raises NotFound."""
    found = session.scalars(
        select(Skill)
        .where(Skill.assistant_id == assistant.id, or_(Skill.id == name_or_id, Skill.name == name_or_id))
        .order_by((Skill.id == name_or_id).desc())
    ).first()
    if found is None:
        raise NotFound(f"'{assistant.name}' has no skill '{name_or_id}'.", param="skill")
    return found


def list_skills(session: Session, assistant: Assistant, after: str | None, limit: int) -> Page[Skill]:
    return read_page(
        session,
        select(Skill).where(Skill.assistant_id == assistant.id),
        key=Skill.id,
        order=[Skill.created_at, Skill.id],
        after=after,
        limit=limit,
    )


def skill_names(session: Session, assistant: Assistant) -> list[str]:
    """In order of creation."""
    names = select(Skill.name).where(Skill.assistant_id == assistant.id)
    return list(session.scalars(names.order_by(Skill.created_at, Skill.id)))


def update_skill(
    session: Session,
    skill: Skill,
    *,
    description: str | None = None,
    grader: Grader | None = None,
    holdout_fraction: float | None = None,
    actor: str,
) -> Skill:
    """Change what is given.

    Raises Conflict(param="holdout_fraction") once the skill has demonstrations: another share would move
    prompts that were trained on to the measuring side.
    """
    skill = session.scalars(
        select(Skill)
        .where(Skill.id == skill.id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()
    changes: dict[str, object] = {}
    if description is not None:
        changes["description"] = skill.description = description
    if grader is not None:
        changes["grader"] = skill.grader = grader.model_dump(mode="json")
    if holdout_fraction is not None and holdout_fraction != skill.holdout_fraction:
        if session.scalar(select(exists().where(DemonstrationRow.skill_id == skill.id))):
            raise Conflict(
                "The skill has demonstrations; its hold-out share can no longer change.",
                param="holdout_fraction",
                code="holdout_fixed",
            )
        changes["holdout_fraction"] = skill.holdout_fraction = holdout_fraction
    if changes:
        session.flush()
        audit.record(
            session,
            team_id=skill.team_id,
            actor=actor,
            action="skill.update",
            object_id=skill.id,
            data=changes,
        )
    return skill


@contextmanager
def _unique_name(session: Session, message: str) -> Iterator[None]:
    """A savepoint around one insert whose only unique columns besides the random id are its name's."""
    try:
        with session.begin_nested():
            yield
    except IntegrityError as error:
        if not violates_unique(error):
            raise
        raise AlreadyExists(message, param="name") from error
