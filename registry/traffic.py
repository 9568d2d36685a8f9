"""How an assistant's traffic is shared out: changes are compare-and-set and audited."""

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.errors import CanaryCoolingDown, InvalidInput, NotFound, RevisionMismatch
from domain.skill import Grader
from domain.traffic import Canary, CanaryRollback, Shadow, Traffic
from registry import aliases, assistants, audit
from registry.session import db_now, violates_unique
from registry.tables import Assistant, Skill, TrafficFigures, TrafficRow

GATEWAY = "gateway"
"""The actor of an automatic rollback."""
_GRADER: TypeAdapter[Grader] = TypeAdapter(Grader)


@dataclass(frozen=True)
class Plan:
    """What the gateway shares out; an assistant without canary and shadow has none."""

    assistant_id: str
    assistant_name: str
    team_id: str
    revision: int
    canary: Canary | None
    shadow: Shadow | None
    grader: Grader | None
    """Of the shadow's skill."""


def get_traffic(session: Session, assistant: Assistant) -> TrafficRow | None:
    """None: never changed, all goes to the champion."""
    return session.get(TrafficRow, assistant.id, populate_existing=True)


def set_traffic(
    session: Session, assistant: Assistant, wanted: Traffic, *, actor: str, expected_revision: int | None
) -> TrafficRow:
    """Share the traffic out as `wanted` says; what is so already changes nothing.

    Figures begin anew when canary or shadow come to another alias, or on at all.
    Raises RevisionMismatch when it is not at `expected_revision` (0: never changed), InvalidInput for an
    unknown alias or skill, CanaryCoolingDown.
    """
    row = _locked(session, assistant)
    revision = 0 if row is None else row.revision
    if expected_revision is not None and expected_revision != revision:
        raise RevisionMismatch(
            f"The traffic is at revision {revision}, not {expected_revision}.", param="If-Match"
        )
    before = Traffic() if row is None else shares(row)
    if row is not None and before == wanted:
        return row
    now = db_now(session)
    _check(session, assistant, wanted)
    if wanted.canary is not None and row is not None:
        _refuse_while_cooling(row, now)
    if row is None:
        row = _create(session, assistant, now)
    row.revision = revision + 1
    row.canary = None if wanted.canary is None else wanted.canary.model_dump(mode="json")
    row.shadow = None if wanted.shadow is None else wanted.shadow.model_dump(mode="json")
    row.updated_at = now
    session.flush()
    if _comes_to_another_alias(before, wanted):
        session.execute(delete(TrafficFigures).where(TrafficFigures.assistant_id == assistant.id))
    audit.record(
        session,
        team_id=assistant.team_id,
        actor=actor,
        action="traffic.clear" if wanted == Traffic() else "traffic.set",
        object_id=assistant.id,
        data={"assistant": assistant.id, "revision": row.revision, **wanted.model_dump(mode="json")},
    )
    return row


def roll_back_canary(session: Session, plan: Plan, rollback: CanaryRollback) -> bool:
    """Take the canary's traffic away and begin its cooldown; False when somebody changed the traffic since
    `plan`, as another process that saw the same has then done."""
    if plan.canary is None:
        return False
    now = db_now(session)
    changed = session.execute(
        update(TrafficRow)
        .where(TrafficRow.assistant_id == plan.assistant_id, TrafficRow.revision == plan.revision)
        .values(
            revision=plan.revision + 1,
            canary=None,
            cooldown_until=now + plan.canary.cooldown_seconds,
            last_rollback=rollback.model_dump(mode="json"),
            rolled_back_at=now,
            updated_at=now,
        )
        .returning(TrafficRow.assistant_id)
    ).all()
    if not changed:
        return False
    audit.record(
        session,
        team_id=plan.team_id,
        actor=GATEWAY,
        action="canary.rollback",
        object_id=plan.assistant_id,
        data={
            "assistant": plan.assistant_id,
            "revision": plan.revision + 1,
            "cooldown_seconds": plan.canary.cooldown_seconds,
            **rollback.model_dump(mode="json"),
        },
    )
    return True


def plans(session: Session) -> list[Plan]:
    """Of every assistant with a canary or a shadow; one query."""
    shadow_skill: ColumnElement[Any] = TrafficRow.shadow["skill"].as_string()
    rows = session.execute(
        select(TrafficRow, Assistant.name, Skill.grader)
        .join(Assistant, Assistant.id == TrafficRow.assistant_id)
        .outerjoin(Skill, (Skill.assistant_id == TrafficRow.assistant_id) & (Skill.name == shadow_skill))
    )
    found = []
    for row, name, grader in rows:
        wanted = shares(row)
        if wanted == Traffic():
            continue
        found.append(
            Plan(
                assistant_id=row.assistant_id,
                assistant_name=name,
                team_id=row.team_id,
                revision=row.revision,
                canary=wanted.canary,
                shadow=wanted.shadow,
                grader=None if grader is None else _GRADER.validate_python(grader),
            )
        )
    return found


def shares(row: TrafficRow) -> Traffic:
    return Traffic.model_validate({"canary": row.canary, "shadow": row.shadow})


def _comes_to_another_alias(before: Traffic, wanted: Traffic) -> bool:
    pairs = ((before.canary, wanted.canary), (before.shadow, wanted.shadow))
    return any(new is not None and (old is None or old.alias != new.alias) for old, new in pairs)


def _check(session: Session, assistant: Assistant, wanted: Traffic) -> None:
    known = {alias.name for alias in aliases.list_aliases(session, assistant)}
    for field_name, side in (("canary", wanted.canary), ("shadow", wanted.shadow)):
        if side is not None and side.alias not in known:
            raise InvalidInput(
                f"'{assistant.name}' has no alias '{side.alias}'.", param=f"{field_name}.alias"
            )
    if wanted.shadow is not None and wanted.shadow.skill is not None:
        try:
            skill = assistants.get_skill(session, assistant, wanted.shadow.skill)
        except NotFound as error:
            raise InvalidInput(error.message, param="shadow.skill") from error
        if skill.name != wanted.shadow.skill:
            raise InvalidInput("A skill is named here, not its id.", param="shadow.skill")


def _refuse_while_cooling(row: TrafficRow, now: float) -> None:
    if row.cooldown_until is None or row.last_rollback is None or row.cooldown_until <= now:
        return
    left = row.cooldown_until - now
    error = CanaryCoolingDown(
        f"The last canary was rolled back: {row.last_rollback['reason']}. "
        f"No canary for another {left:.0f} s.",
        param="canary",
    )
    error.retry_after_seconds = left
    raise error


def _locked(session: Session, assistant: Assistant) -> TrafficRow | None:
    return session.scalars(
        select(TrafficRow)
        .where(TrafficRow.assistant_id == assistant.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()


def _create(session: Session, assistant: Assistant, now: float) -> TrafficRow:
    row = TrafficRow(assistant_id=assistant.id, team_id=assistant.team_id, revision=0, updated_at=now)
    try:
        with session.begin_nested():
            session.add(row)
            session.flush()
    except IntegrityError as error:
        if not violates_unique(error):
            raise
        raise RevisionMismatch("The traffic was changed by someone else.", param="If-Match") from error
    return row
