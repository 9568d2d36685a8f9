"""Versions: what updates made, with measurements, verdict, recipe and lineage, and how two compare."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.context import ACTOR, Ctx, Reading, Team
from api.fields import Body
from api.lists import ListOf, Paging, listing
from api.replies import MeasurementReply, VersionDetailReply, VersionReply
from api.routes.assistants import VersionNames
from domain.measurement import ItemScore, SuiteKind
from domain.paired import cautious_difference
from evaluation.statistics import mcnemar_exact
from registry import aliases, assistants, measurements, retention, versions
from registry.tables import Assistant, MeasurementRow, Version

router = APIRouter(tags=["versions"])

MOST_CHANGED = 50


class VersionChange(Body):
    pinned: bool


class ChangedItem(BaseModel):
    """An item that the two versions score differently."""

    item: str
    prompt: str
    expected: str
    from_output: str
    to_output: str
    from_score: float
    to_score: float


class SuiteComparison(BaseModel):
    """One suite; figures of the change are over the items that both versions were measured on."""

    kind: SuiteKind
    suite: str
    from_score: float | None
    to_score: float | None
    paired_items: int
    change: float | None
    """Mean of to - from over the paired items; null without any."""
    low: float | None
    high: float | None
    """95% interval of `change`."""
    gained: int
    lost: int
    p_value: float | None
    """Two-sided exact McNemar test; null where scores are not just 0 and 1."""
    changed: list[ChangedItem]
    """The first 50, losses first."""


class Comparison(BaseModel):
    object: str = "comparison"
    from_version: str
    to_version: str
    suites: list[SuiteComparison]


@router.get("/v1/assistants/{assistant}/versions")
def list_versions(
    assistant: str, session: Reading, team_id: Team, paging: Annotated[Paging, Depends()]
) -> ListOf[VersionReply]:
    owner = assistants.get_assistant(session, team_id, assistant)
    page = versions.list_versions(session, owner, paging.after, paging.limit)
    return listing(_version_replies(session, owner, page.rows), has_more=page.has_more)


@router.get("/v1/assistants/{assistant}/versions/{version}")
def get_version(assistant: str, version: str, session: Reading, team_id: Team) -> VersionDetailReply:
    """`version` is `v3` or an id."""
    owner = assistants.get_assistant(session, team_id, assistant)
    row = versions.get_version(session, owner, version)
    measured = [measurement_reply(row.number, one) for one in measurements.list_measurements(session, row)]
    [reply] = _version_replies(session, owner, [row])
    return VersionDetailReply(
        **reply.model_dump(),
        lineage=[f"v{number}" for number in versions.lineage_numbers(session, row)],
        recipe=row.recipe,
        manifest=row.manifest,
        measurements=measured,
    )


@router.patch("/v1/assistants/{assistant}/versions/{version}")
def pin_version(
    assistant: str, version: str, body: VersionChange, context: Ctx, team_id: Team
) -> VersionReply:
    """Keep the version's files whatever retention's policy says, or no longer."""
    with context.sessions.begin() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        row = versions.get_version(session, owner, version)
        retention.pin(session, row, pinned=body.pinned, actor=ACTOR)
        [reply] = _version_replies(session, owner, [row])
        return reply


@router.get("/v1/assistants/{assistant}/versions/{version}/compare")
def compare_versions(
    assistant: str,
    version: str,
    to: Annotated[str, Query(max_length=64)],
    session: Reading,
    team_id: Team,
) -> Comparison:
    """How the version `to` differs from `version`, suite by suite, on identical items."""
    owner = assistants.get_assistant(session, team_id, assistant)
    old = versions.get_version(session, owner, version)
    new = versions.get_version(session, owner, to)
    before = {(row.kind, row.suite): row for row in measurements.list_measurements(session, old)}
    after = {(row.kind, row.suite): row for row in measurements.list_measurements(session, new)}
    return Comparison(
        from_version=f"v{old.number}",
        to_version=f"v{new.number}",
        # Skills before general benchmarks, each by name.
        suites=[
            _compare(session, key, before.get(key), after.get(key))
            for key in sorted({*before, *after}, key=lambda key: (key[0] != "skill", key[1]))
        ],
    )


def measurement_reply(number: int, row: MeasurementRow) -> MeasurementReply:
    return MeasurementReply(
        id=row.id,
        version=f"v{number}",
        kind=_kind(row.kind),
        suite=row.suite,
        score=row.score,
        n=row.n,
        low=row.low,
        high=row.high,
        updated_at=int(row.updated_at),
    )


def _version_replies(session: Session, assistant: Assistant, rows: Sequence[Version]) -> list[VersionReply]:
    pointers = aliases.list_aliases(session, assistant)
    names = VersionNames(session, [row.parent_id for row in rows])
    return [
        VersionReply(
            id=row.id,
            assistant=assistant.name,
            version=f"v{row.number}",
            kind=row.kind,
            parent=names.maybe(row.parent_id),
            update=row.update_id,
            aliases=[alias.name for alias in pointers if alias.version_id == row.id],
            manifest_sha256=row.manifest_sha256,
            verdict=row.verdict,
            pinned=row.pinned,
            pruned=row.pruned_at is not None,
            created_at=int(row.created_at),
        )
        for row in rows
    ]


def _compare(
    session: Session, key: tuple[str, str], old: MeasurementRow | None, new: MeasurementRow | None
) -> SuiteComparison:
    before = {} if old is None else {one.item: one for one in measurements.items_of(session, old)}
    after = {} if new is None else {one.item: one for one in measurements.items_of(session, new)}
    pairs = [(before[item], after[item]) for item in sorted(before.keys() & after.keys())]
    differences = [now.score - then.score for then, now in pairs]
    change = cautious_difference(differences) if differences else None
    gained, lost = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    right_or_wrong = all(score in (0.0, 1.0) for pair in pairs for score in (pair[0].score, pair[1].score))
    return SuiteComparison(
        kind=_kind(key[0]),
        suite=key[1],
        from_score=None if old is None else old.score,
        to_score=None if new is None else new.score,
        paired_items=len(pairs),
        change=None if change is None else change.mean,
        low=None if change is None else change.low,
        high=None if change is None else change.high,
        gained=gained,
        lost=lost,
        p_value=mcnemar_exact(lost, gained).two_sided if pairs and right_or_wrong else None,
        changed=_changed(pairs),
    )


def _changed(pairs: list[tuple[ItemScore, ItemScore]]) -> list[ChangedItem]:
    found = [pair for pair in pairs if pair[0].score != pair[1].score]
    found.sort(key=lambda pair: pair[1].score - pair[0].score)
    return [
        ChangedItem(
            item=now.item,
            prompt=now.prompt,
            expected=now.expected,
            from_output=then.output,
            to_output=now.output,
            from_score=then.score,
            to_score=now.score,
        )
        for then, now in found[:MOST_CHANGED]
    ]


def _kind(text: str) -> SuiteKind:
    return "skill" if text == "skill" else "general"
