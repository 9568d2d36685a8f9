"""Measurements of an assistant's versions: one by one, as a matrix, and as forgetting metrics."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel

from api.context import Reading, Team
from api.lists import ListOf, Paging, listing
from api.replies import MeasurementDetailReply, MeasurementReply
from api.retention import retention
from api.routes.versions import measurement_reply
from domain.measurement import Outcome
from domain.version import CHAMPION
from evaluation import forgetting
from registry import aliases, assistants, measurements, versions

router = APIRouter(tags=["measurements"])


@dataclass(frozen=True, slots=True)
class Cell:
    score: float
    n: int
    low: float
    high: float


class MatrixVersion(BaseModel):
    version: str
    parent: str | None
    taught: list[str]
    """Skills that its own update taught."""
    outcome: Outcome | None
    """The gate's; null for v0."""
    champion: bool
    created_at: int


class Matrix(BaseModel):
    object: str = "matrix"
    assistant: str
    skills: list[str]
    versions: list[MatrixVersion]
    scores: dict[str, dict[str, Cell | None]]
    """By skill, then version; null where unmeasured."""
    general: dict[str, dict[str, Cell | None]]
    """By general benchmark, then version."""


class Forgetting(forgetting.ForgettingSummary):
    object: str = "forgetting"
    assistant: str
    version: str
    lineage: list[str]
    learned: dict[str, str]
    """By skill: the version of the lineage that first learned it."""


@router.get("/v1/assistants/{assistant}/evaluations")
def list_evaluations(
    assistant: str,
    session: Reading,
    team_id: Team,
    paging: Annotated[Paging, Depends()],
    version: Annotated[str | None, Query(max_length=64)] = None,
) -> ListOf[MeasurementReply]:
    """By version number; of one version only when `version` is given."""
    owner = assistants.get_assistant(session, team_id, assistant)
    of = None if version is None else versions.get_version(session, owner, version)
    page = measurements.page_measurements(session, owner, of, paging.after, paging.limit)
    numbers = versions.numbers_of(session, [row.version_id for row in page.rows])
    shown = [measurement_reply(numbers[row.version_id], row) for row in page.rows]
    return listing(shown, has_more=page.has_more)


@router.get("/v1/assistants/{assistant}/evaluations/{measurement}")
def get_evaluation(
    assistant: str, measurement: str, session: Reading, team_id: Team
) -> MeasurementDetailReply:
    """One measurement with every item's output."""
    owner = assistants.get_assistant(session, team_id, assistant)
    row = measurements.get_measurement(session, owner, measurement)
    number = versions.numbers_of(session, [row.version_id])[row.version_id]
    items = measurements.items_of(session, row)
    return MeasurementDetailReply(**measurement_reply(number, row).model_dump(), items=items)


@router.get("/v1/assistants/{assistant}/matrix", response_model=Matrix)
def get_matrix(assistant: str, session: Reading, team_id: Team) -> Response:
    owner = assistants.get_assistant(session, team_id, assistant)
    champion = aliases.get_alias(session, owner, CHAMPION).version_id
    shown = [
        MatrixVersion(
            version=f"v{row.number}",
            parent=None if row.parent is None else f"v{row.parent}",
            taught=list(row.taught),
            outcome=row.outcome,
            champion=row.id == champion,
            created_at=int(row.created_at),
        )
        for row in versions.outlines(session, owner)
    ]
    cells: dict[str, dict[str, dict[str, Cell]]] = {"skill": {}, "general": {}}
    for one in measurements.matrix(session, owner):
        cell = Cell(score=one.score, n=one.n, low=one.low, high=one.high)
        cells[one.kind].setdefault(one.suite, {})[f"v{one.version}"] = cell
    skills = assistants.skill_names(session, owner)
    names = [one.version for one in shown]
    matrix = Matrix(
        assistant=owner.name,
        skills=skills,
        versions=shown,
        scores={skill: _row(cells["skill"].get(skill, {}), names) for skill in skills},
        general={suite: _row(found, names) for suite, found in cells["general"].items()},
    )
    # Already valid: the framework would check all of its thousands of cells again.
    return Response(matrix.model_dump_json(), media_type="application/json")


@router.get("/v1/assistants/{assistant}/forgetting")
def get_forgetting(
    assistant: str,
    session: Reading,
    team_id: Team,
    version: Annotated[str | None, Query(max_length=64)] = None,
) -> Forgetting:
    """Along the parents of `version` (default: the champion), from v0."""
    owner = assistants.get_assistant(session, team_id, assistant)
    wanted = aliases.get_alias(session, owner, CHAMPION).version_id if version is None else version
    end = versions.get_version(session, owner, wanted)
    found = retention(session, end)
    return Forgetting(
        **found.summary.model_dump(),
        assistant=owner.name,
        version=f"v{end.number}",
        lineage=[f"v{number}" for number in found.lineage],
        learned={skill: f"v{number}" for skill, number in found.learned.items()},
    )


def _row(measured: dict[str, Cell], versions: list[str]) -> dict[str, Any]:
    return {version: measured.get(version) for version in versions}
