"""Measurements of versions, with every item's output."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Select, case, exists, select
from sqlalchemy.orm import Session, aliased

from domain.errors import NotFound
from domain.ids import new_id
from domain.measurement import ItemScore, Measurement, SuiteKind
from registry.lineage import line_to
from registry.paging import Page, read_page
from registry.session import db_now
from registry.tables import Assistant, MeasurementItem, MeasurementRow, Version
from registry.upsert import upsert


class MatrixRow(NamedTuple):
    """One measured cell: a version on one suite. There may be tens of thousands."""

    version: int
    kind: str
    suite: str
    score: float
    n: int
    low: float
    high: float


def save_measurement(session: Session, version: Version, measurement: Measurement) -> MeasurementRow:
    """Store or overwrite the version's figures for the suite; items add to those already stored.

    `measurement` speaks for all items, the earlier ones included.
    """
    upsert(
        session,
        MeasurementRow,
        [
            {
                "id": new_id("meas"),
                "team_id": version.team_id,
                "assistant_id": version.assistant_id,
                "version_id": version.id,
                "kind": measurement.kind,
                "suite": measurement.suite,
                "score": measurement.score,
                "n": measurement.n,
                "low": measurement.low,
                "high": measurement.high,
                "updated_at": db_now(session),
            }
        ],
        keys=["version_id", "kind", "suite"],
        keep=["id"],
    )
    row = session.scalars(
        select(MeasurementRow)
        .where(
            MeasurementRow.version_id == version.id,
            MeasurementRow.kind == measurement.kind,
            MeasurementRow.suite == measurement.suite,
        )
        .execution_options(populate_existing=True)
    ).one()
    upsert(
        session,
        MeasurementItem,
        [{"measurement_id": row.id, "team_id": row.team_id, **_storable(item)} for item in measurement.items],
        keys=["measurement_id", "item"],
    )
    return row


def measured_items(session: Session, version: Version, kind: SuiteKind, suite: str) -> dict[str, ItemScore]:
    """Items of the suite that the version was measured on, by item id; empty when it never was."""
    rows = session.scalars(
        select(MeasurementItem)
        .join(MeasurementRow, MeasurementRow.id == MeasurementItem.measurement_id)
        .where(
            MeasurementRow.version_id == version.id,
            MeasurementRow.kind == kind,
            MeasurementRow.suite == suite,
        )
    )
    return {row.item: _item(row) for row in rows}


def list_measurements(session: Session, version: Version) -> list[MeasurementRow]:
    """Skills before general benchmarks, each by name."""
    return list(
        session.scalars(
            select(MeasurementRow)
            .where(MeasurementRow.version_id == version.id)
            .order_by(MeasurementRow.kind.desc(), MeasurementRow.suite)
        )
    )


def page_measurements(
    session: Session, assistant: Assistant, version: Version | None, after: str | None, limit: int
) -> Page[MeasurementRow]:
    """Of one version or of all, by version number, skills before general benchmarks, each by name."""
    rows = select(MeasurementRow).join(Version, Version.id == MeasurementRow.version_id)
    rows = rows.where(MeasurementRow.assistant_id == assistant.id)
    if version is None:
        rows = rows.where(Version.id.in_(_measured_from(assistant, after, limit + 2)))
    else:
        rows = rows.where(MeasurementRow.version_id == version.id)
    skills_first = case((MeasurementRow.kind == "skill", 0), else_=1)
    return read_page(
        session,
        rows,
        key=MeasurementRow.id,
        order=[Version.number, skills_first, MeasurementRow.suite],
        after=after,
        limit=limit,
    )


def _measured_from(assistant: Assistant, after: str | None, count: int) -> Select[str]:
    """Ids of the first `count` measured versions from that of the measurement `after` on (None: v0): no page
    of fewer rows goes beyond them, and only their rows have to be sorted."""
    found = select(Version.id).where(
        Version.assistant_id == assistant.id, exists().where(MeasurementRow.version_id == Version.id)
    )
    if after is not None:
        seen = aliased(Version)
        number = select(seen.number).join(MeasurementRow, MeasurementRow.version_id == seen.id)
        found = found.where(Version.number >= number.where(MeasurementRow.id == after).scalar_subquery())
    return found.order_by(Version.number).limit(count)


def get_measurement(session: Session, assistant: Assistant, id: str) -> MeasurementRow:
    """Raises NotFound."""
    found = session.scalars(
        select(MeasurementRow).where(MeasurementRow.assistant_id == assistant.id, MeasurementRow.id == id)
    ).one_or_none()
    if found is None:
        raise NotFound(f"'{assistant.name}' has no measurement '{id}'.", param="measurement")
    return found


def items_of(session: Session, measurement: MeasurementRow) -> list[ItemScore]:
    """By item id."""
    rows = session.scalars(
        select(MeasurementItem)
        .where(MeasurementItem.measurement_id == measurement.id)
        .order_by(MeasurementItem.item)
    )
    return [_item(row) for row in rows]


def scores_along(session: Session, version: Version) -> list[tuple[int, str, str, float]]:
    """(number, kind, suite, score) of every measured cell from v0 along the parents to `version`."""
    line = line_to(version.id)
    cells = select(line.c.number, MeasurementRow.kind, MeasurementRow.suite, MeasurementRow.score)
    rows = cells.join(MeasurementRow, MeasurementRow.version_id == line.c.id)
    return [(number, kind, suite, score) for number, kind, suite, score in session.execute(rows)]


def matrix(
    session: Session, assistant: Assistant, versions: Sequence[Version] | None = None
) -> list[MatrixRow]:
    """Every measured cell of the assistant, or of its `versions`, by version number, kind and suite; one
    query."""
    cells = (
        select(
            Version.number,
            MeasurementRow.kind,
            MeasurementRow.suite,
            MeasurementRow.score,
            MeasurementRow.n,
            MeasurementRow.low,
            MeasurementRow.high,
        )
        .join(MeasurementRow, MeasurementRow.version_id == Version.id)
        .order_by(Version.number, MeasurementRow.kind, MeasurementRow.suite)
    )
    if versions is None:
        cells = cells.where(Version.assistant_id == assistant.id)
    else:
        cells = cells.where(Version.id.in_([version.id for version in versions]))
    return [MatrixRow(*cell) for cell in session.execute(cells)]


def _storable(item: ItemScore) -> dict[str, str | float]:
    # A model can emit NUL, which PostgreSQL's text cannot hold.
    return {
        name: value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value
        for name, value in item.model_dump(mode="json").items()
    }


def _item(row: MeasurementItem) -> ItemScore:
    return ItemScore(
        item=row.item, prompt=row.prompt, output=row.output, expected=row.expected, score=row.score
    )
