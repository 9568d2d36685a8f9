"""Aliases: movable names for versions, each move compare-and-set, with append-only history."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.errors import Conflict, InvalidInput, NotFound, NothingToRollBackTo, RevisionMismatch
from domain.ids import new_id
from domain.version import CHAMPION, is_reserved_alias
from registry import audit
from registry.lineage import move_champion
from registry.paging import Page, read_page
from registry.session import db_now, violates_unique
from registry.tables import Alias, AliasMove, Assistant, Version


def get_alias(session: Session, assistant: Assistant, name: str) -> Alias:
    """Raises NotFound."""
    alias = session.scalars(
        select(Alias).where(Alias.assistant_id == assistant.id, Alias.name == name)
    ).one_or_none()
    if alias is None:
        raise NotFound(f"'{assistant.name}' has no alias '{name}'.", param="alias")
    return alias


def list_aliases(session: Session, assistant: Assistant) -> list[Alias]:
    return list(session.scalars(select(Alias).where(Alias.assistant_id == assistant.id).order_by(Alias.id)))


def aliases_of(session: Session, assistants: Sequence[Assistant]) -> dict[str, list[Alias]]:
    """By assistant id, in order of creation."""
    found: dict[str, list[Alias]] = {assistant.id: [] for assistant in assistants}
    for alias in session.scalars(select(Alias).where(Alias.assistant_id.in_(found)).order_by(Alias.id)):
        found[alias.assistant_id].append(alias)
    return found


def locked_alias(session: Session, assistant: Assistant, name: str) -> Alias:
    """The alias as it is now, locked to the end of the transaction. Raises NotFound."""
    alias = _locked(session, assistant, name)
    return get_alias(session, assistant, name) if alias is None else alias


def history(
    session: Session, assistant: Assistant, alias: str, after: str | None, limit: int
) -> Page[AliasMove]:
    """Moves of one alias, newest first. Raises NotFound for an alias that never was."""
    get_alias(session, assistant, alias)
    return read_page(
        session,
        select(AliasMove).where(AliasMove.assistant_id == assistant.id, AliasMove.alias == alias),
        key=AliasMove.id,
        order=[AliasMove.revision],
        after=after,
        limit=limit,
        newest_first=True,
    )


def move_alias(
    session: Session,
    assistant: Assistant,
    alias: str,
    version: Version,
    *,
    kind: str,
    reason: str,
    actor: str,
    expected_revision: int | None,
    update_id: str | None = None,
    force: bool = False,
) -> AliasMove:
    """Point `alias` at `version`, creating the alias when it is new.

    A move to where the alias already points changes nothing and returns the move that brought it there.
    `force` lets a version through that its gate blocked.
    Raises RevisionMismatch when the alias is not at `expected_revision` (0: it must not exist yet),
    Conflict(code="version_blocked" or "version_pruned"), NotFound for another assistant's version,
    InvalidInput for a name that looks like a version.
    """
    if is_reserved_alias(alias):
        raise InvalidInput(f"'{alias}' is how versions are written, not an alias.", param="alias")
    if version.assistant_id != assistant.id:
        raise NotFound(f"'{assistant.name}' has no version '{version.id}'.", param="version")
    against = _blocked_because(version)
    if against is not None and not force:
        raise Conflict(
            f"v{version.number} was blocked by its gate: {against}",
            param="version",
            code="version_blocked",
        )
    _require_files(session, version)
    current = _locked(session, assistant, alias)
    revision = 0 if current is None else current.revision
    if expected_revision is not None and expected_revision != revision:
        raise RevisionMismatch(
            f"'{alias}' is at revision {revision}, not {expected_revision}.", param="If-Match"
        )
    if current is not None and current.version_id == version.id:
        return _move_at(session, current)
    move = AliasMove(
        id=new_id("move"),
        team_id=assistant.team_id,
        assistant_id=assistant.id,
        alias=alias,
        from_version_id=None if current is None else current.version_id,
        to_version_id=version.id,
        revision=revision + 1,
        kind=kind,
        reason=reason,
        actor=actor,
        update_id=update_id,
        created_at=db_now(session),
    )
    if current is None:
        _create(session, assistant, move)
    else:
        # Compared above and set here under one row lock.
        current.version_id, current.revision, current.updated_at = version.id, move.revision, move.created_at
        if alias == CHAMPION and move.from_version_id is not None:
            move_champion(session, move.from_version_id, version.id)
    session.add(move)
    session.flush()
    audit.record(
        session,
        team_id=assistant.team_id,
        actor=actor,
        action="alias.move",
        object_id=move.id,
        data={
            "assistant": assistant.id,
            "alias": alias,
            "from": move.from_version_id,
            "to": version.id,
            "revision": move.revision,
            "kind": kind,
            "reason": reason,
            "forced": against is not None,
        },
    )
    return move


def roll_back(
    session: Session, assistant: Assistant, *, to: Version | None, reason: str, actor: str
) -> AliasMove:
    """Point champion at an earlier version: `to`, or what it pointed at before the current one came.

    Repeated calls walk further back: a version that was rolled away from is no longer in the line.
    Raises NothingToRollBackTo, and Conflict(code="version_blocked") for a blocked `to` that never served.
    """
    champion = _locked(session, assistant, CHAMPION)
    if champion is None:
        raise NothingToRollBackTo(f"'{assistant.name}' has never served a version.")
    if to is not None:
        if to.id == champion.version_id:
            raise NothingToRollBackTo(f"v{to.number} is already the champion.", param="to")
        target, served = to, to.id in _line(session, assistant)
    else:
        before = rollback_target(session, assistant)
        if before is None:
            raise NothingToRollBackTo(f"'{assistant.name}' has no version before its current one.")
        target, served = session.get_one(Version, before), True
    return move_alias(
        session,
        assistant,
        CHAMPION,
        target,
        kind="rollback",
        reason=reason,
        actor=actor,
        expected_revision=champion.revision,
        force=served,
    )


def rollback_target(session: Session, assistant: Assistant) -> str | None:
    """Id of the version where `roll_back` goes when it is told none; None: nowhere."""
    newest = session.execute(
        select(AliasMove.kind, AliasMove.from_version_id)
        .where(AliasMove.assistant_id == assistant.id, AliasMove.alias == CHAMPION)
        .order_by(AliasMove.revision.desc())
        .limit(1)
    ).one()
    if newest.kind != "rollback":
        before: str | None = newest.from_version_id
        return before
    line = _line(session, assistant)
    return line[-2] if len(line) > 1 else None


def champion_line(session: Session, assistant: Assistant, *, newest: int) -> list[Version]:
    """The `newest` of the versions that led to the current champion, oldest first; the last one is the
    champion itself, and the one before it where `roll_back` goes when it is told no target."""
    line = _line(session, assistant)[-newest:]
    versions = {
        version.id: version for version in session.scalars(select(Version).where(Version.id.in_(line)))
    }
    return [versions[version_id] for version_id in line]


def pruned(number: int) -> Conflict:
    return Conflict(
        f"The files of v{number} are not kept any more (retention).", param="version", code="version_pruned"
    )


def _require_files(session: Session, version: Version) -> None:
    """Lock the version against retention to the end of the transaction. Raises Conflict."""
    pruned_at = session.scalar(
        select(Version.pruned_at).where(Version.id == version.id).with_for_update(read=True, key_share=True)
    )
    if pruned_at is not None:
        raise pruned(version.number)


def _blocked_because(version: Version) -> str | None:
    """The gate's reasons, or None when it did not block the version."""
    if version.verdict is None or version.verdict["outcome"] != "block":
        return None
    return "; ".join(version.verdict["reasons"])


def _line(session: Session, assistant: Assistant) -> list[str]:
    """Version ids that led to the current champion, oldest first; neighbours always differ.

    A move appends; a rollback to a version of the line cuts the line behind it.
    """
    moves = session.execute(
        select(AliasMove.kind, AliasMove.to_version_id)
        .where(AliasMove.assistant_id == assistant.id, AliasMove.alias == CHAMPION)
        .order_by(AliasMove.revision)
    )
    line: list[str] = []
    for kind, version_id in moves:
        if kind == "rollback" and version_id in line:
            while line[-1] != version_id:
                line.pop()
        else:
            line.append(version_id)
    return line


def _locked(session: Session, assistant: Assistant, name: str) -> Alias | None:
    return session.scalars(
        select(Alias)
        .where(Alias.assistant_id == assistant.id, Alias.name == name)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one_or_none()


def _move_at(session: Session, alias: Alias) -> AliasMove:
    return session.scalars(
        select(AliasMove).where(
            AliasMove.assistant_id == alias.assistant_id,
            AliasMove.alias == alias.name,
            AliasMove.revision == alias.revision,
        )
    ).one()


def _create(session: Session, assistant: Assistant, move: AliasMove) -> None:
    alias = Alias(
        team_id=assistant.team_id,
        assistant_id=assistant.id,
        name=move.alias,
        version_id=move.to_version_id,
        revision=move.revision,
        updated_at=move.created_at,
    )
    try:
        with session.begin_nested():
            session.add(alias)
            session.flush()
    except IntegrityError as error:
        if not violates_unique(error):
            raise
        raise RevisionMismatch(f"'{move.alias}' was created by someone else.", param="If-Match") from error
