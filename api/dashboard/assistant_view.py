"""The page of one assistant."""

from collections.abc import Mapping, Sequence

from api.dashboard.contexts import (
    AssistantPage,
    MoveRow,
    Notice,
    Pill,
    SkillRow,
    Tone,
    TrafficPanel,
    UpdateCard,
)
from api.dashboard.links import assistant_url, crumbs, rollback_url, version_link
from api.dashboard.matrix_view import matrix
from api.dashboard.retention_view import retention_tiles
from api.dashboard.serving_view import serving
from api.dashboard.text import moment, parameters
from domain.version import CHAMPION
from evaluation.forgetting import ForgettingSummary
from registry.measurements import MatrixRow
from registry.overview import AssistantOverview, SkillOverview
from registry.tables import AliasMove, Version

_KIND_TONES: dict[str, Tone] = {"create": "plain", "publish": "good", "promote": "accent", "rollback": "warn"}
_KIND_WORDS = {"create": "created", "publish": "published", "promote": "promoted", "rollback": "rolled back"}


def assistant_page(
    overview: AssistantOverview,
    *,
    skills: Sequence[SkillOverview],
    versions: Sequence[Version],
    numbers: Mapping[str, int],
    retained: ForgettingSummary,
    measured: Sequence[MatrixRow],
    taught: Mapping[int, Sequence[str]],
    moves: Sequence[AliasMove],
    cards: list[UpdateCard],
    can_roll_back: bool,
    traffic: TrafficPanel | None,
    every_version: bool,
    moved: int | None,
    api_url: str,
    now: float,
) -> AssistantPage:
    """`versions` are the columns of the matrix, by number, all of the assistant's with `every_version`;
    `numbers` those of the versions in `moves` by id; `retained` is the champion's; `moves` are newest first;
    `moved` is the revision of the move that the visitor has just made."""
    assistant = overview.assistant
    rows = [
        _move_row(assistant.name, move, numbers, newest=index == 0, now=now)
        for index, move in enumerate(moves)
    ]
    query = "?versions=all" if every_version else ""
    return AssistantPage(
        title=assistant.name,
        crumbs=crumbs(assistant.name),
        name=assistant.name,
        url=assistant_url(assistant.name) + query,
        base_model=assistant.base_model,
        size=parameters(assistant.parameter_count),
        created=moment(assistant.created_at, now),
        notice=_moved_notice(moves, numbers, moved),
        serving=serving(overview, now),
        rollback_url=rollback_url(assistant.name),
        can_roll_back=can_roll_back,
        traffic=traffic,
        matrix=matrix(
            assistant.name,
            versions,
            measured,
            taught=taught,
            skills=[one.skill.name for one in skills],
            champion_id=overview.wanted.id,
            hidden=assistant.next_version - len(versions),
        ),
        tiles=retention_tiles(retained),
        skills=[_skill_row(one) for one in skills],
        moves=rows,
        updates=cards,
        api_url=api_url,
    )


def _skill_row(one: SkillOverview) -> SkillRow:
    return SkillRow(
        name=one.skill.name,
        description=one.skill.description,
        grader=one.skill.grader["type"],
        train=one.train,
        holdout=one.holdout,
        untaught=one.untaught,
    )


def _move_row(
    assistant: str, move: AliasMove, numbers: Mapping[str, int], *, newest: bool, now: float
) -> MoveRow:
    came_from = move.from_version_id
    return MoveRow(
        alias=move.alias,
        from_version=version_link(assistant, numbers[came_from]) if came_from is not None else None,
        to_version=version_link(assistant, numbers[move.to_version_id]),
        pill=Pill(_KIND_WORDS[move.kind], _KIND_TONES[move.kind]),
        rollback=move.kind == "rollback",
        newest=newest,
        reason=move.reason,
        actor=move.actor,
        at=moment(move.created_at, now),
    )


def _moved_notice(moves: Sequence[AliasMove], numbers: Mapping[str, int], moved: int | None) -> Notice | None:
    for move in moves:
        if move.alias == CHAMPION and move.revision == moved and move.from_version_id is not None:
            came_from, went_to = numbers[move.from_version_id], numbers[move.to_version_id]
            return Notice(f"champion moved from v{came_from} to v{went_to}.", "good")
    return None
