"""Demonstrations: accepting a batch at once, and which of them are still to be taught."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Subquery, exists, insert, or_, select, union_all
from sqlalchemy.orm import Session, aliased

from domain.demonstration import Demonstration, Message, Split, is_held_out
from domain.errors import Conflict, InvalidInput
from domain.ids import new_id
from domain.update import FINISHED, Status
from registry import audit
from registry.lineage import line_to
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import (
    Assistant,
    Batch,
    DemonstrationRow,
    Skill,
    Update,
    UpdateDemonstration,
    Version,
)

HASHES_PER_QUERY = 10_000
"""SQLite takes at most 32766 variables in one statement."""
_UNFINISHED = [status for status in Status if status not in FINISHED]


@dataclass(frozen=True)
class BatchResult:
    batch: Batch
    accepted: int
    duplicates: int
    """Lines left out because the skill already has their content, or an earlier line of the batch has."""
    train: int
    holdout: int
    """Of the accepted ones."""


def accept_batch(
    session: Session,
    assistant: Assistant,
    skill: Skill,
    demonstrations: list[Demonstration],
    *,
    actor: str,
    split: Split | None = None,
) -> BatchResult:
    """Store all new demonstrations of the batch, split by their prompts, or all on the side of `split`.

    Raises InvalidInput when the batch is empty, and Conflict(code="prompt_on_other_side") when a `split` is
    given and the skill has one of the prompts on the other side.
    """
    if not demonstrations:
        raise InvalidInput("The batch is empty.", param="demonstrations")
    # One batch of a skill at a time: the look-up of known hashes below must not race another insert.
    skill = session.scalars(
        select(Skill)
        .where(Skill.id == skill.id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()
    by_hash: dict[str, Demonstration] = {}
    for demonstration in demonstrations:
        by_hash.setdefault(demonstration.content_hash(), demonstration)
    if split is not None:
        _require_same_side(session, skill, demonstrations, split)
    for known in _known_hashes(session, skill, list(by_hash)):
        del by_hash[known]
    now = db_now(session)
    batch = Batch(
        id=new_id("batch"),
        team_id=assistant.team_id,
        skill_id=skill.id,
        accepted=len(by_hash),
        duplicates=len(demonstrations) - len(by_hash),
        created_at=now,
    )
    session.add(batch)
    session.flush()
    rows = [
        {
            "id": new_id("demo"),
            "team_id": assistant.team_id,
            "assistant_id": assistant.id,
            "skill_id": skill.id,
            "batch_id": batch.id,
            "split": split or _split_of(new, skill),
            "content_hash": content_hash,
            "body": new.model_dump(mode="json"),
            "created_at": now,
        }
        for content_hash, new in by_hash.items()
    ]
    if rows:
        session.execute(insert(DemonstrationRow), rows)
    holdout = sum(row["split"] == "holdout" for row in rows)
    skill.train_demonstrations += len(rows) - holdout
    skill.holdout_demonstrations += holdout
    audit.record(
        session,
        team_id=assistant.team_id,
        actor=actor,
        action="batch.accept",
        object_id=batch.id,
        data={"skill": skill.id, "accepted": batch.accepted, "duplicates": batch.duplicates},
    )
    return BatchResult(
        batch=batch,
        accepted=batch.accepted,
        duplicates=batch.duplicates,
        train=len(rows) - holdout,
        holdout=holdout,
    )


def list_demonstrations(
    session: Session, skill: Skill, after: str | None, limit: int, split: Split | None = None
) -> Page[DemonstrationRow]:
    """In order of acceptance."""
    rows = select(DemonstrationRow).where(DemonstrationRow.skill_id == skill.id)
    if split is not None:
        rows = rows.where(DemonstrationRow.split == split)
    return read_page(
        session, rows, key=DemonstrationRow.id, order=[DemonstrationRow.seq], after=after, limit=limit
    )


def holdout_items(session: Session, skill: Skill) -> list[DemonstrationRow]:
    """What a version is measured on, in order of acceptance."""
    return list(
        session.scalars(
            select(DemonstrationRow)
            .where(DemonstrationRow.skill_id == skill.id, DemonstrationRow.split == "holdout")
            .order_by(DemonstrationRow.seq)
        )
    )


def untaught(assistant: Assistant, skills: Sequence[Skill] | None) -> Subquery:
    """Columns `id`, `seq` and `skill_id` of the train-split demonstrations that neither the champion's
    lineage nor a waiting update was taught; `skills` None: of all.

    Found by index and by what they are: not one of those taught is looked at.
    """
    rows = select(DemonstrationRow.id, DemonstrationRow.seq, DemonstrationRow.skill_id).where(
        DemonstrationRow.assistant_id == assistant.id, DemonstrationRow.split == "train"
    )
    if skills is not None:
        rows = rows.where(DemonstrationRow.skill_id.in_([skill.id for skill in skills]))
    new = rows.where(DemonstrationRow.update_id.is_(None))
    ended = select(Update.id).where(
        Update.assistant_id == assistant.id, ~Update.in_lineage, Update.status.in_(FINISHED)
    )
    holder = aliased(Update)
    # The champion may have gone back to where an earlier update taught it.
    held = (
        exists()
        .where(UpdateDemonstration.demonstration_id == DemonstrationRow.id)
        .where(holder.id == UpdateDemonstration.update_id)
        .where(or_(holder.in_lineage, holder.status.in_(_UNFINISHED)))
    )
    given_back = rows.where(DemonstrationRow.update_id.in_(ended), ~held)
    return union_all(new, given_back).subquery("untaught")


def taught_prompts(
    session: Session, assistant: Assistant, version: Version, exclude_skills: Sequence[str]
) -> list[list[Message]]:
    """Distinct prompts taught along the version's lineage, without those of `exclude_skills` (names)."""
    line = line_to(version.id)
    bodies = session.scalars(
        select(DemonstrationRow.body)
        .join(Skill, Skill.id == DemonstrationRow.skill_id)
        .where(
            DemonstrationRow.assistant_id == assistant.id,
            Skill.name.not_in(list(exclude_skills)),
            DemonstrationRow.id.in_(
                select(UpdateDemonstration.demonstration_id).join(
                    line, line.c.update_id == UpdateDemonstration.update_id
                )
            ),
        )
        .order_by(DemonstrationRow.seq)
    )
    demonstrations = (Demonstration.model_validate(body) for body in bodies)
    return list({taught.prompt_hash(): taught.messages for taught in demonstrations}.values())


def _split_of(new: Demonstration, skill: Skill) -> Split:
    return "holdout" if is_held_out(new.prompt_hash(), skill.holdout_fraction) else "train"


def _require_same_side(
    session: Session, skill: Skill, demonstrations: list[Demonstration], split: Split
) -> None:
    """What is measured on must not be trained on, whichever way its demonstrations came."""
    wanted = {one.prompt_hash(): one for one in demonstrations}
    others = select(DemonstrationRow.body).where(
        DemonstrationRow.skill_id == skill.id, DemonstrationRow.split != split
    )
    for body in session.scalars(others.order_by(DemonstrationRow.seq)):
        clash = wanted.get(Demonstration.model_validate(body).prompt_hash())
        if clash is not None:
            kept = "held out" if split == "train" else "trained on"
            prompt = clash.messages[-1].content[:80]
            raise Conflict(
                f"'{skill.name}' has the prompt {prompt!r} among those {kept} already.",
                code="prompt_on_other_side",
            )


def _known_hashes(session: Session, skill: Skill, hashes: list[str]) -> set[str]:
    known: set[str] = set()
    for start in range(0, len(hashes), HASHES_PER_QUERY):
        known.update(
            session.scalars(
                select(DemonstrationRow.content_hash).where(
                    DemonstrationRow.skill_id == skill.id,
                    DemonstrationRow.content_hash.in_(hashes[start : start + HASHES_PER_QUERY]),
                )
            )
        )
    return known
