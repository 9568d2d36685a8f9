"""Updates as people see them: create, read, cancel, pause, resume. `registry.leases` is the worker's side,
and its verbs are verbs of this module too."""

from collections.abc import Sequence

from sqlalchemy import func, insert, literal, select
from sqlalchemy import update as mark
from sqlalchemy.orm import Session

from domain.errors import Conflict, InvalidInput, NotFound, NothingToTeach
from domain.ids import new_id
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.update import Publish, Status, require_transition
from registry import audit, events
from registry.assistants import get_skill
from registry.claims import Claim, Signals, locked
from registry.demonstrations import untaught
from registry.leases import (
    claim,
    claimable,
    finish,
    heartbeat,
    note_progress,
    release,
    retry_later,
    set_phase,
)
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import Assistant, DemonstrationRow, Skill, Update, UpdateDemonstration

__all__ = [
    "Claim",
    "Signals",
    "claim",
    "claimable",
    "create_update",
    "demonstrations_of",
    "finish",
    "get_update",
    "heartbeat",
    "list_updates",
    "note_progress",
    "release",
    "request_cancel",
    "request_pause",
    "resume",
    "retry_later",
    "set_phase",
]


def create_update(
    session: Session,
    assistant: Assistant,
    *,
    skills: list[str] | None,
    recipe: Recipe,
    gate: GateRules,
    publish: Publish,
    actor: str,
) -> Update:
    """Queue an update that teaches every untaught demonstration of `skills` (None: of all that have some,
    in the order in which these were accepted).

    Raises NotFound(param="skills") for an unknown name, NothingToTeach when a named skill, or the whole
    assistant, has no new demonstrations.
    """
    # One creation at a time per assistant: two must not both take the same demonstrations.
    session.execute(
        select(Assistant.id).where(Assistant.id == assistant.id).with_for_update(key_share=True)
    ).scalar_one()
    chosen = None if skills is None else _named(session, assistant, skills)
    update = Update(
        id=new_id("upd"),
        team_id=assistant.team_id,
        assistant_id=assistant.id,
        status=Status.QUEUED,
        skills=[],
        recipe=recipe.model_dump(mode="json"),
        gate=gate.model_dump(mode="json"),
        publish=publish,
        cancel_requested=False,
        pause_requested=False,
        fence=0,
        created_at=db_now(session),
    )
    with session.begin_nested():  # in which nothing stays of what turns out to teach nothing
        session.add(update)
        session.flush()
        taken = _take(session, assistant, update, chosen)
        idle = [] if chosen is None else [skill.name for skill in chosen if skill.name not in taken]
        if idle or not taken:
            of = f" of {', '.join(idle)}" if idle else ""
            raise NothingToTeach(
                f"Every demonstration{of} for training is already taught or waiting in an update.",
                param="skills",
            )
    update.skills = list(taken) if chosen is None else [skill.name for skill in chosen]
    session.flush()
    count = sum(taken.values())
    events.append(
        session,
        update,
        type="message",
        message=f"Queued: {count} demonstrations of {', '.join(update.skills)}.",
        data={"status": Status.QUEUED, "demonstrations": count},
    )
    _audit(session, update, actor, "update.create", {"skills": update.skills, "demonstrations": count})
    return update


def get_update(session: Session, team_id: str, id: str) -> Update:
    """Raises NotFound, also for another team's update."""
    update = session.scalars(select(Update).where(Update.team_id == team_id, Update.id == id)).one_or_none()
    if update is None:
        raise NotFound(f"There is no update '{id}'.", param="update")
    return update


def list_updates(session: Session, assistant: Assistant, after: str | None, limit: int) -> Page[Update]:
    """In order of creation."""
    return read_page(
        session,
        select(Update).where(Update.assistant_id == assistant.id),
        key=Update.id,
        order=[Update.seq],
        after=after,
        limit=limit,
    )


def demonstrations_of(session: Session, update: Update) -> list[DemonstrationRow]:
    """What the update teaches, in order of acceptance."""
    return list(
        session.scalars(
            select(DemonstrationRow)
            .join(UpdateDemonstration, UpdateDemonstration.demonstration_id == DemonstrationRow.id)
            .where(UpdateDemonstration.update_id == update.id)
            .order_by(DemonstrationRow.seq)
        )
    )


def request_cancel(session: Session, update: Update, actor: str) -> Update:
    """Cancel at once, or ask the worker that runs it; from then on the update cannot publish.

    A worker whose lease ran out is not waited for, nor is its successor.

    Raises Conflict when it has ended, and Conflict(code="already_published") when its version is out.
    """
    row = locked(session, update.id)
    status = Status(row.status)
    require_transition(status, Status.CANCELLED)
    if row.version_id is not None:
        raise Conflict(
            "The update has published its version; roll back instead.",
            param="status",
            code="already_published",
        )
    running = _has_a_worker(session, row)
    if running and row.cancel_requested:
        return row
    row.cancel_requested = True
    if not running:
        row.finished_at = db_now(session)
        row.status = Status.CANCELLED
        row.claimed_by = row.lease_until = None
    _announce(session, row, actor, "update.cancel", "Cancel requested.")
    return row


def request_pause(session: Session, update: Update, actor: str) -> Update:
    """Pause at once, or ask the worker that runs it, unless its lease ran out. Raises Conflict when it
    has ended or is paused."""
    row = locked(session, update.id)
    status = Status(row.status)
    require_transition(status, Status.PAUSED)
    if _has_a_worker(session, row):
        row.pause_requested = True
    else:
        row.status = Status.PAUSED
        row.pause_requested = False
        row.claimed_by = row.lease_until = None
    _announce(session, row, actor, "update.pause", "Pause requested.")
    return row


def resume(session: Session, update: Update, actor: str) -> Update:
    """Queue a paused update again, its setbacks forgiven, or withdraw a pause that the worker has not met
    yet. Raises Conflict."""
    row = locked(session, update.id)
    if row.status == Status.RUNNING and row.pause_requested:
        row.pause_requested = False
    elif row.status == Status.PAUSED:
        row.status = Status.QUEUED
        row.setbacks, row.not_before = 0, None
    else:
        raise Conflict(f"The update is {row.status}; only a paused one can be resumed.", param="status")
    _announce(session, row, actor, "update.resume", "Resumed.")
    return row


def _has_a_worker(session: Session, row: Update) -> bool:
    """Whether somebody holds a lease on the locked row and so will meet a request."""
    return row.status == Status.RUNNING and row.lease_until is not None and row.lease_until >= db_now(session)


def _take(
    session: Session, assistant: Assistant, update: Update, skills: Sequence[Skill] | None
) -> dict[str, int]:
    """Make what is untaught the update's; how many demonstrations by skill, first accepted first.

    By statements over sets: a first update may take a million.
    """
    rows = untaught(assistant, skills)
    owner = [literal(id) for id in (update.team_id, update.assistant_id, update.id)]
    columns = ["team_id", "assistant_id", "update_id", "demonstration_id"]
    session.execute(insert(UpdateDemonstration).from_select(columns, select(*owner, rows.c.id)))
    # By what was written: on PostgreSQL a second look could already see another batch.
    mine = select(UpdateDemonstration.demonstration_id).where(UpdateDemonstration.update_id == update.id)
    session.execute(
        mark(DemonstrationRow)
        .where(DemonstrationRow.id.in_(mine))
        .values(update_id=update.id)
        .execution_options(synchronize_session=False)
    )
    taken = (
        select(
            DemonstrationRow.skill_id,
            func.min(DemonstrationRow.seq).label("first"),
            func.count().label("count"),
        )
        .where(
            DemonstrationRow.assistant_id == assistant.id,
            DemonstrationRow.update_id == update.id,
        )
        .group_by(DemonstrationRow.skill_id)
        .subquery()
    )
    by_skill = select(Skill.name, taken.c.count).join(taken, taken.c.skill_id == Skill.id)
    return dict(session.execute(by_skill.order_by(taken.c.first)).all())


def _named(session: Session, assistant: Assistant, names: list[str]) -> list[Skill]:
    if not names:
        raise InvalidInput("Name at least one skill, or leave 'skills' out.", param="skills")
    skills = []
    for name in dict.fromkeys(names):
        try:
            skills.append(get_skill(session, assistant, name))
        except NotFound as error:
            raise NotFound(error.message, param="skills") from error
    return skills


def _announce(session: Session, update: Update, actor: str, action: str, message: str) -> None:
    session.flush()
    events.append(session, update, type="message", message=message, data={"status": update.status})
    _audit(session, update, actor, action, {"status": update.status})


def _audit(session: Session, update: Update, actor: str, action: str, data: dict[str, object]) -> None:
    audit.record(session, team_id=update.team_id, actor=actor, action=action, object_id=update.id, data=data)
