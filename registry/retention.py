"""Which versions' files are still needed, and the record of those that are not kept any more.

Rows are never deleted: lineage, measurements and history of a pruned version stay. Its files go after the
transaction that marked it, so that nobody who asks here first can meet half of them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, exists, or_, select, update
from sqlalchemy.orm import Session, aliased

from domain.errors import NotFound
from domain.update import FINISHED, Status
from registry import aliases, audit
from registry.engines import checkpoint_id
from registry.session import clock, db_now
from registry.tables import Alias, AliasMove, Assistant, ServingState, Update, Version


@dataclass(frozen=True)
class Policy:
    keep_versions: int
    """Newest versions of each assistant that stay."""
    grace_seconds: float
    """Since it was made, loaded, verified or served, a version stays for so long."""


@dataclass(frozen=True)
class VersionFiles:
    """What the ledger says about a version's files."""

    version_id: str
    name: str
    """`assistant@v3`"""
    manifest_sha256: str
    pruned: bool
    aliases: tuple[str, ...]
    checkpoint_id: str | None
    """The full version that it is or lies on; None where that is the base model itself."""


def use(session: Session, version_id: str) -> None:
    """Somebody is about to read the version's files: they stay for the policy's grace, by the database's
    clock. Raises NotFound, Conflict(code="version_pruned")."""
    marked = session.execute(
        update(Version)
        .where(Version.id == version_id, Version.pruned_at.is_(None))
        .values(used_at=clock())
        .returning(Version.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if marked is None:
        number = session.scalar(select(Version.number).where(Version.id == version_id))
        if number is None:
            raise NotFound(f"There is no version '{version_id}'.", param="version")
        raise aliases.pruned(number)


def pin(session: Session, version: Version, *, pinned: bool, actor: str) -> None:
    """Keep the version's files whatever the policy says, or no longer.

    Raises Conflict(code="version_pruned") when there is nothing left to keep.
    """
    locked = session.scalars(
        select(Version)
        .where(Version.id == version.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    if locked.pruned_at is not None:
        raise aliases.pruned(locked.number)
    if locked.pinned == pinned:
        return
    locked.pinned = pinned
    audit.record(
        session,
        team_id=locked.team_id,
        actor=actor,
        action="version.pin" if pinned else "version.unpin",
        object_id=locked.id,
        data={"number": locked.number},
    )


def prunable(session: Session, policy: Policy, version_id: str | None = None) -> list[str]:
    """Ids of the versions that `prune` would let go now, oldest first; with `version_id`, of that one."""
    unneeded = select(Version.id, Version.assistant_id).where(_unneeded(policy))
    if version_id is not None:
        unneeded = unneeded.where(Version.id == version_id)
    rows = session.execute(unneeded.order_by(Version.created_at, Version.number)).all()
    # A rollback must always be possible.
    targets = {
        assistant.id: aliases.rollback_target(session, assistant)
        for assistant in session.scalars(
            select(Assistant).where(Assistant.id.in_({row.assistant_id for row in rows}))
        )
    }
    return [row.id for row in rows if row.id != targets[row.assistant_id]]


def prune(session: Session, version_id: str, policy: Policy) -> bool:
    """Whether the version's files may go once the caller has committed; false when something needs them.

    The row lock keeps out whoever would need them from now on; the check follows it, so that it sees
    whoever came before.
    """
    version = session.scalars(
        select(Version)
        .where(Version.id == version_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    if not prunable(session, policy, version_id):
        return False
    version.pruned_at = db_now(session)
    audit.record(
        session,
        team_id=version.team_id,
        actor="retention",
        action="version.prune",
        object_id=version.id,
        data={"number": version.number, "manifest_sha256": version.manifest_sha256},
    )
    return True


def unneeded_ids(session: Session, stored: Iterable[str]) -> list[str]:
    """Those of the `stored` ids that no version has, or only a pruned one, and that no claim can publish.

    A claim publishes under the id that its update and fence make, and only while it is the newest; so an
    id that was stored before this question, and is nobody's now, will never be anybody's.
    """
    needed = set(session.scalars(select(Version.id).where(Version.pruned_at.is_(None))))
    running = select(Update.id, Update.fence).where(Update.status == Status.RUNNING)
    needed |= {publishing_id(update_id, fence) for update_id, fence in session.execute(running)}
    return [version_id for version_id in stored if version_id not in needed]


def publishing_id(update_id: str, fence: int) -> str:
    """The id under which the claim of this update with this fence publishes."""
    return f"ver_{hashlib.sha256(f'{update_id}:{fence}'.encode()).hexdigest()[:24]}"


def version_files(session: Session) -> list[VersionFiles]:
    """Every version that has, or had, files; by assistant and number, so that what a version lies on comes
    before it."""
    named: dict[str, list[str]] = {}
    for version_id, name in session.execute(select(Alias.version_id, Alias.name).order_by(Alias.name)):
        named.setdefault(version_id, []).append(name)
    rows = session.execute(
        select(
            Version.id,
            Assistant.name,
            Version.number,
            Version.manifest_sha256,
            Version.pruned_at,
            checkpoint_id().label("checkpoint_id"),
        )
        .join(Assistant, Assistant.id == Version.assistant_id)
        .where(Version.manifest_sha256.is_not(None))
        .order_by(Assistant.name, Assistant.id, Version.number)
    )
    return [
        VersionFiles(
            version_id=row.id,
            name=f"{row.name}@v{row.number}",
            manifest_sha256=row.manifest_sha256 or "",
            pruned=row.pruned_at is not None,
            aliases=tuple(named.get(row.id, ())),
            checkpoint_id=row.checkpoint_id,
        )
        for row in rows
    ]


def _unneeded(policy: Policy) -> ColumnElement[bool]:
    newer = aliased(Version)
    since = clock() - policy.grace_seconds
    # The newest version that has as many newer ones as stay; to count each one's would be quadratic.
    first_to_go = (
        select(newer.number)
        .where(newer.assistant_id == Version.assistant_id, newer.manifest_sha256.is_not(None))
        .order_by(newer.number.desc())
        .offset(policy.keep_versions)
        .limit(1)
        .scalar_subquery()
    )
    return and_(
        Version.manifest_sha256.is_not(None),
        Version.pruned_at.is_(None),
        Version.pinned.is_(False),
        Version.created_at < since,
        or_(Version.used_at.is_(None), Version.used_at < since),
        Version.number <= first_to_go,
        # What an adapter lies on is needed as long as the adapter is.
        or_(Version.kind != "full", ~exists().where(*_lies_on_it())),
        ~exists().where(Alias.version_id == Version.id),
        ~exists().where(ServingState.version_id == Version.id),
        ~exists().where(Update.parent_version_id == Version.id, Update.status.not_in(FINISHED)),
        ~exists().where(AliasMove.from_version_id == Version.id, AliasMove.created_at >= since),
    )


def _lies_on_it() -> list[ColumnElement[bool]]:
    adapter = aliased(Version)
    return [
        adapter.assistant_id == Version.assistant_id,
        adapter.kind == "adapter",
        adapter.pruned_at.is_(None),
        checkpoint_id(adapter) == Version.id,
    ]
