"""Lineages: a version and its ancestors along `parent_id`, down to v0."""

from sqlalchemy import CTE, case, literal, select, update
from sqlalchemy.orm import Session, aliased

from registry.tables import Update, Version


def line_to(version_id: object, *, newest: int | None = None) -> CTE:
    """Columns `id`, `number` and `update_id` of the version (a value or a scalar subquery) and of its
    ancestors; with `newest`, of the last so many of them."""
    columns = Version.id, Version.number, Version.update_id, Version.parent_id
    start = select(*columns, literal(1).label("depth")).where(Version.id == version_id)
    line = start.cte("lineage", recursive=True)
    parent = aliased(Version)
    step = select(parent.id, parent.number, parent.update_id, parent.parent_id, line.c.depth + 1).join(
        line, parent.id == line.c.parent_id
    )
    return line.union_all(step if newest is None else step.where(line.c.depth < newest))


def move_champion(session: Session, from_version_id: str, to_version_id: str) -> None:
    """Keep `Update.in_lineage` true: the champion of their assistant moved from one version to the other.

    Reads and writes no more than what lies between the two and their last common ancestor.
    """
    walk = _walk(from_version_id, to_version_id)
    left = select(walk.c.left_id).where(walk.c.left_number > walk.c.joined_number)
    joined = select(walk.c.joined_id).where(walk.c.joined_number > walk.c.left_number)
    for passed, in_lineage in ((left, False), (joined, True)):
        made_by = select(Version.update_id).where(Version.id.in_(passed))
        session.execute(
            update(Update)
            .where(Update.id.in_(made_by))
            .values(in_lineage=in_lineage)
            .execution_options(synchronize_session=False)
        )


def _walk(left_id: str, joined_id: str) -> CTE:
    """From both versions towards v0, one parent at a time, always on the side with the higher number, until
    both sides are at one version: a parent's number is lower than its child's."""
    one, other = aliased(Version), aliased(Version)
    pair = select(
        one.id.label("left_id"),
        one.number.label("left_number"),
        other.id.label("joined_id"),
        other.number.label("joined_number"),
    )
    start = pair.join_from(one, other, other.id == joined_id).where(one.id == left_id)
    walk = start.cte("walk", recursive=True)
    child, parent = aliased(Version), aliased(Version)
    on_left = walk.c.left_number > walk.c.joined_number
    step = (
        select(
            case((on_left, parent.id), else_=walk.c.left_id),
            case((on_left, parent.number), else_=walk.c.left_number),
            case((on_left, walk.c.joined_id), else_=parent.id),
            case((on_left, walk.c.joined_number), else_=parent.number),
        )
        .select_from(walk)
        .join(child, child.id == case((on_left, walk.c.left_id), else_=walk.c.joined_id))
        .join(parent, parent.id == child.parent_id)
        .where(walk.c.left_number != walk.c.joined_number)
    )
    return walk.union_all(step)
