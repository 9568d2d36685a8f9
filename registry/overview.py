"""Reads for people who look at many things at once: a fixed number of queries, whatever the length."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from domain.version import CHAMPION
from registry.demonstrations import untaught
from registry.paging import Page
from registry.tables import (
    Alias,
    AliasMove,
    Assistant,
    Event,
    ServingState,
    Skill,
    Update,
    UpdateDemonstration,
    Version,
)


@dataclass(frozen=True)
class AssistantOverview:
    """One assistant, what its champion asks for, and what the swap controller last made true."""

    assistant: Assistant
    champion: Alias
    wanted: Version
    answering: Version | None
    """None until a first version of this alias was loaded."""
    serving_error: str | None
    skills: int
    last_update: Update | None


def overviews(session: Session, assistants: Sequence[Assistant]) -> list[AssistantOverview]:
    """In the order of `assistants`."""
    ids = [assistant.id for assistant in assistants]
    champions = {
        alias.assistant_id: alias
        for alias in session.scalars(select(Alias).where(Alias.assistant_id.in_(ids), Alias.name == CHAMPION))
    }
    states = {
        state.assistant_id: state
        for state in session.scalars(
            select(ServingState).where(ServingState.assistant_id.in_(ids), ServingState.alias == CHAMPION)
        )
    }
    shown = [alias.version_id for alias in champions.values()]
    shown += [state.version_id for state in states.values() if state.version_id is not None]
    versions = {
        version.id: version for version in session.scalars(select(Version).where(Version.id.in_(shown)))
    }
    skills = dict(
        session.execute(
            select(Skill.assistant_id, func.count())
            .where(Skill.assistant_id.in_(ids))
            .group_by(Skill.assistant_id)
        ).all()
    )
    # One look into the index for each assistant: grouped, every update of them all would be read.
    newest_of = select(func.max(Update.seq)).where(Update.assistant_id == Assistant.id).scalar_subquery()
    newest = select(newest_of).where(Assistant.id.in_(ids))
    updates = {
        update.assistant_id: update
        for update in session.scalars(select(Update).where(Update.seq.in_(newest)))
    }
    found = []
    for assistant in assistants:
        champion, state = champions[assistant.id], states.get(assistant.id)
        answering = state.version_id if state is not None else None
        found.append(
            AssistantOverview(
                assistant=assistant,
                champion=champion,
                wanted=versions[champion.version_id],
                answering=versions[answering] if answering is not None else None,
                serving_error=state.error if state is not None else None,
                skills=skills.get(assistant.id, 0),
                last_update=updates.get(assistant.id),
            )
        )
    return found


@dataclass(frozen=True)
class SkillOverview:
    skill: Skill
    train: int
    holdout: int
    untaught: int
    """Train-split demonstrations that the next update would teach."""


def skill_overviews(session: Session, assistant: Assistant) -> list[SkillOverview]:
    """In order of creation."""
    waiting = untaught(assistant, None)
    new: dict[str, int] = dict(
        session.execute(select(waiting.c.skill_id, func.count()).group_by(waiting.c.skill_id)).all()
    )
    skills = select(Skill).where(Skill.assistant_id == assistant.id).order_by(Skill.created_at, Skill.id)
    return [
        SkillOverview(
            skill=skill,
            train=skill.train_demonstrations,
            holdout=skill.holdout_demonstrations,
            untaught=new.get(skill.id, 0),
        )
        for skill in session.scalars(skills)
    ]


def count_demonstrations(session: Session, update: Update) -> int:
    """How many demonstrations the update teaches."""
    rows = select(func.count()).where(UpdateDemonstration.update_id == update.id)
    return session.execute(rows).scalar_one()


def newest_steps(session: Session, update: Update, *, limit: int) -> list[Event]:
    """The newest `limit` metrics events of an update, newest last."""
    events = select(Event).where(Event.update_id == update.id, Event.type == "metrics")
    return list(reversed(session.scalars(events.order_by(Event.seq.desc()).limit(limit)).all()))


def newest_messages(session: Session, update: Update, *, limit: int) -> Page[Event]:
    """The newest `limit` events other than metrics, newest first."""
    events = select(Event).where(Event.update_id == update.id, Event.type != "metrics")
    rows = list(session.scalars(events.order_by(Event.seq.desc()).limit(limit + 1)))
    return Page(rows[:limit], has_more=len(rows) > limit)


def shown_versions(
    session: Session, assistant: Assistant, champion: Version, *, newest: int | None
) -> list[Version]:
    """v0, the champion and the `newest` versions (None: all), in order of their numbers."""
    versions = select(Version).where(Version.assistant_id == assistant.id)
    if newest is not None:
        # Numbers have no gaps.
        recent = range(max(assistant.next_version - newest, 0), assistant.next_version)
        versions = versions.where(Version.number.in_(sorted({0, champion.number, *recent})))
    return list(session.scalars(versions.order_by(Version.number)))


def taught_skills(
    session: Session, assistant: Assistant, versions: Sequence[Version] | None
) -> dict[int, list[str]]:
    """Names of the skills that the own updates of these versions (None: all) taught, by version number."""
    rows = select(Version.number, Update.skills).join(Update, Update.id == Version.update_id)
    if versions is None:
        rows = rows.where(Version.assistant_id == assistant.id)
    else:
        rows = rows.where(Version.id.in_([version.id for version in versions]))
    return dict(session.execute(rows).all())


def newest_updates(session: Session, assistant: Assistant, *, limit: int) -> list[Update]:
    """The newest `limit` updates, newest first."""
    updates = select(Update).where(Update.assistant_id == assistant.id).order_by(Update.seq.desc())
    return list(session.scalars(updates.limit(limit)))


def newest_moves(session: Session, assistant: Assistant, *, limit: int) -> list[AliasMove]:
    """The newest `limit` moves of all aliases of the assistant, newest first."""
    moves = select(AliasMove).where(AliasMove.assistant_id == assistant.id)
    newest = moves.order_by(AliasMove.created_at.desc(), AliasMove.revision.desc(), AliasMove.id)
    return list(session.scalars(newest.limit(limit)))
