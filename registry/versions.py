"""Versions: reading them and their lineage, and publishing a new one in one transaction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, aliased

from domain.errors import Conflict, CorruptArtifact, NotFound, UpdateCancelled
from domain.measurement import Measurement, Outcome, Verdict
from domain.recipe import Recipe
from domain.version import CHAMPION, Manifest, parse_version
from registry import aliases, audit, events
from registry.claims import Claim, held
from registry.engines import checkpoint_of
from registry.lineage import line_to
from registry.measurements import save_measurement
from registry.paging import Page, read_page
from registry.retention import publishing_id
from registry.session import db_now
from registry.tables import Assistant, Update, Version


def get_version(session: Session, assistant: Assistant, number_or_id: int | str) -> Version:
    """By number, by `v7` or by id. Raises NotFound."""
    number = parse_version(number_or_id) if isinstance(number_or_id, str) else number_or_id
    wanted = Version.id == number_or_id if number is None else Version.number == number
    version = session.scalars(
        select(Version).where(Version.assistant_id == assistant.id, wanted)
    ).one_or_none()
    if version is None:
        name = number_or_id if number is None else f"v{number}"
        raise NotFound(f"'{assistant.name}' has no version '{name}'.", param="version")
    return version


def list_versions(session: Session, assistant: Assistant, after: str | None, limit: int) -> Page[Version]:
    """In order of their numbers."""
    return read_page(
        session,
        select(Version).where(Version.assistant_id == assistant.id),
        key=Version.id,
        order=[Version.number],
        after=after,
        limit=limit,
    )


@dataclass(frozen=True)
class Outline:
    """A version without its manifest and recipe, which make up most of its row."""

    id: str
    number: int
    parent: int | None
    taught: tuple[str, ...]
    """Names of the skills that its own update taught."""
    outcome: Outcome | None
    """The gate's; None for v0."""
    created_at: float


def outlines(session: Session, assistant: Assistant) -> list[Outline]:
    """Every version of the assistant, in order of their numbers; one query."""
    parent = aliased(Version)
    rows = session.execute(
        select(
            Version.id,
            Version.number,
            parent.number,
            Update.skills,
            Version.verdict["outcome"].as_string(),
            Version.created_at,
        )
        .outerjoin(parent, parent.id == Version.parent_id)
        .outerjoin(Update, Update.id == Version.update_id)
        .where(Version.assistant_id == assistant.id)
        .order_by(Version.number)
    )
    return [
        Outline(id, number, of, tuple(skills or ()), outcome, created_at)
        for id, number, of, skills, outcome, created_at in rows
    ]


def numbers_of(session: Session, ids: Iterable[str | None]) -> dict[str, int]:
    """Version numbers by id; one query however many."""
    wanted = {id for id in ids if id is not None}
    if not wanted:
        return {}
    return dict(session.execute(select(Version.id, Version.number).where(Version.id.in_(wanted))).all())


def made_at(session: Session, assistants: Sequence[Assistant]) -> dict[str, list[tuple[int, float]]]:
    """(number, time of creation) of every version, by assistant id."""
    found: dict[str, list[tuple[int, float]]] = {assistant.id: [] for assistant in assistants}
    rows = select(Version.assistant_id, Version.number, Version.created_at)
    for owner, number, created_at in session.execute(
        rows.where(Version.assistant_id.in_(found)).order_by(Version.number)
    ):
        found[owner].append((number, created_at))
    return found


def lineage_numbers(session: Session, version: Version, *, newest: int | None = None) -> list[int]:
    """From v0 along the parents to `version` itself; with `newest`, the last so many."""
    line = line_to(version.id, newest=newest)
    return list(session.scalars(select(line.c.number).order_by(line.c.number)))


def taught_along(session: Session, version: Version) -> list[tuple[int, list[str]]]:
    """(number, names of the skills that its own update taught) from v0 along the parents to `version`."""
    line = line_to(version.id)
    rows = select(line.c.number, Update.skills).outerjoin(Update, Update.id == line.c.update_id)
    return [(number, skills or []) for number, skills in session.execute(rows.order_by(line.c.number))]


def lineage(session: Session, version: Version) -> list[Version]:
    """From v0 along the parents to `version` itself."""
    line = line_to(version.id)
    rows = select(Version).join(line, line.c.id == Version.id)
    return list(session.scalars(rows.order_by(Version.number)))


def allocate_version(session: Session, claim: Claim) -> tuple[str, int]:
    """The id and number under which this claim may publish.

    The same claim always gets the same id, and another claim another one, so that a worker that lost its
    lease can never touch the files of its successor. Numbers have no gaps: one is used up at publish only.
    Raises StaleFence, UpdateCancelled after an acknowledged cancel.
    """
    update = _publishing(session, claim)
    assistant = session.get_one(Assistant, update.assistant_id, populate_existing=True)
    return publishing_id(update.id, claim.fence), assistant.next_version


def publish(
    session: Session,
    claim: Claim,
    *,
    version_id: str,
    number: int,
    served_name: str,
    manifest: Manifest,
    manifest_sha256: str,
    recipe: Recipe,
    verdict: Verdict,
    measurements: list[Measurement],
    move_champion: bool,
) -> Version:
    """Make the candidate a version: row, measurements, champion, audit and event in one transaction.

    An update publishes once: when it already has, that version is returned unchanged.
    When the champion is no longer the parent that the verdict compared with (someone rolled back or
    promoted meanwhile), the version is kept with the outcome `hold` and the champion stays.
    Raises StaleFence, UpdateCancelled after an acknowledged cancel,
    Conflict(code="version_blocked") when asked to move the champion without a passing verdict,
    Conflict(code="version_number_taken"), CorruptArtifact for another update's manifest, or an adapter's
    that lies on something else than its parent.
    """
    update = _publishing(session, claim)
    if update.version_id is not None:
        return session.get_one(Version, update.version_id)
    if manifest.update_id != update.id:
        raise CorruptArtifact(f"The manifest names update '{manifest.update_id}', not '{update.id}'.")
    if manifest.kind == "adapter":
        _require_checkpoint(session, update, manifest)
    if move_champion and verdict.outcome != "pass":
        raise Conflict(
            f"A version with the outcome '{verdict.outcome}' does not serve.", code="version_blocked"
        )
    assistant = session.scalars(
        select(Assistant)
        .where(Assistant.id == update.assistant_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()
    if number != assistant.next_version:
        raise Conflict(
            f"v{number} is not the next version of '{assistant.name}', v{assistant.next_version} is.",
            code="version_number_taken",
        )
    assistant.next_version = number + 1
    champion = aliases.locked_alias(session, assistant, CHAMPION)
    if move_champion and champion.version_id != update.parent_version_id:
        verdict = _hold(session, update, champion.version_id, verdict)
        move_champion = False
    version = Version(
        id=version_id,
        team_id=update.team_id,
        assistant_id=assistant.id,
        number=number,
        kind=manifest.kind,
        parent_id=update.parent_version_id,
        update_id=update.id,
        served_name=served_name,
        manifest_sha256=manifest_sha256,
        manifest=manifest.model_dump(mode="json"),
        recipe=recipe.model_dump(mode="json"),
        verdict=verdict.model_dump(mode="json"),
        created_at=db_now(session),
    )
    session.add(version)
    session.flush()  # before the update names it: the two rows refer to each other
    update.version_id = version.id
    update.verdict = version.verdict
    session.flush()
    for measurement in measurements:
        save_measurement(session, version, measurement)
    audit.record(
        session,
        team_id=update.team_id,
        actor="worker",
        action="version.publish",
        object_id=version.id,
        data={
            "number": number,
            "update": update.id,
            "manifest_sha256": manifest_sha256,
            "outcome": verdict.outcome,
        },
    )
    if move_champion:
        aliases.move_alias(
            session,
            assistant,
            CHAMPION,
            version,
            kind="publish",
            reason="; ".join(verdict.reasons),
            actor="worker",
            expected_revision=champion.revision,
            update_id=update.id,
        )
    events.append(
        session,
        update,
        type="verdict",
        message=f"v{number}: {verdict.outcome}. {'; '.join(verdict.reasons)}",
        level="info" if verdict.outcome == "pass" else "warning",
        data={"version": number, "verdict": version.verdict, "champion": move_champion},
    )
    return version


def _publishing(session: Session, claim: Claim) -> Update:
    update = held(session, claim)
    if update.version_id is None and update.cancel_requested:
        raise UpdateCancelled("The update was cancelled; it publishes nothing.")
    return update


def _require_checkpoint(session: Session, update: Update, manifest: Manifest) -> None:
    whole = None
    if update.parent_version_id is not None:
        whole = checkpoint_of(session, session.get_one(Version, update.parent_version_id))
    expected = None if whole is None else (whole.id, whole.manifest_sha256)
    named = manifest.checkpoint
    if (None if named is None else (named.version_id, named.manifest_sha256)) != expected:
        raise CorruptArtifact("The manifest names another checkpoint than the parent version lies on.")


def _hold(session: Session, update: Update, champion_id: str, verdict: Verdict) -> Verdict:
    numbers = dict(
        session.execute(
            select(Version.id, Version.number).where(
                or_(Version.id == champion_id, Version.id == update.parent_version_id)
            )
        ).all()
    )
    reason = (
        f"measured against v{numbers[update.parent_version_id or '']}, "
        f"but the champion is now v{numbers[champion_id]}"
    )
    return Verdict(outcome="hold", reasons=[reason, *verdict.reasons], checks=verdict.checks)
