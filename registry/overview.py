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
    newest = select(func.max(Update.seq)).where(Update.assistant_id.in_(ids)).group_by(Update.assistant_id)
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


def newest_versions(session: Session, assistant: Assistant, *, limit: int | None) -> list[Version]:
    """The newest `limit` versions (None: all), newest last."""
    versions = select(Version).where(Version.assistant_id == assistant.id).order_by(Version.number.desc())
    if limit is not None:
        versions = versions.limit(limit)
    return list(reversed(session.scalars(versions).all()))


def newest_updates(session: Session, assistant: Assistant, *, limit: int) -> list[Update]:
    """The newest `limit` updates, newest first."""
    updates = select(Update).where(Update.assistant_id == assistant.id).order_by(Update.seq.desc())
    return list(session.scalars(updates.limit(limit)))


def newest_moves(session: Session, assistant: Assistant, *, limit: int) -> list[AliasMove]:
    """The newest `limit` moves of all aliases of the assistant, newest first."""
    moves = select(AliasMove).where(AliasMove.assistant_id == assistant.id)
    newest = moves.order_by(AliasMove.created_at.desc(), AliasMove.revision.desc(), AliasMove.id)
    return list(session.scalars(newest.limit(limit)))


def taught_skills(session: Session, versions: Sequence[Version]) -> dict[str, list[str]]:
    """Names of the skills that each version's own update taught, by version id; v0 is not among them."""
    made_by = {version.update_id: version.id for version in versions if version.update_id is not None}
    rows = session.execute(select(Update.id, Update.skills).where(Update.id.in_(made_by)))
    return {made_by[update_id]: list(skills) for update_id, skills in rows}
