"""A rollback of the champion, as the API and the dashboard both do it: choose, verify, move, await."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.context import Context
from api.version_files import verify_files
from domain.errors import RevisionMismatch
from domain.version import CHAMPION
from registry import aliases, assistants, versions
from registry.tables import AliasMove, Assistant, Version

SERVING_SECONDS = 10.0
"""How long a reply waits for the new version to answer."""


@dataclass(frozen=True)
class RollbackPlan:
    """A rollback that is possible, to a version whose files were verified."""

    assistant: Assistant
    target: Version
    asked: str | int | None
    """The version that was asked for; None: where the champion came from."""

    def carry_out(
        self, session: Session, *, reason: str, actor: str, seen_revision: int | None = None
    ) -> AliasMove:
        """The caller commits. `seen_revision` is the champion's when the user decided.

        Raises RevisionMismatch when the champion was moved since then, NothingToRollBackTo.
        """
        champion = aliases.locked_alias(session, self.assistant, CHAMPION)
        if seen_revision is not None and champion.revision != seen_revision:
            raise RevisionMismatch("'champion' was moved by someone else.", param="revision")
        move = _roll_back(session, self.assistant, self.asked, reason, actor)
        if move.to_version_id != self.target.id:
            # Only what was verified may be moved to.
            raise RevisionMismatch("'champion' was moved by someone else.", param="to")
        return move


def plan_rollback(context: Context, team_id: str, assistant: str, to: str | int | None) -> RollbackPlan:
    """`to` is a version's number or name; None means where the champion came from.

    Raises NotFound, NothingToRollBackTo, Conflict for a blocked version, CorruptArtifact. Hashing a large
    version takes seconds, hence before the transaction that moves.
    """
    with context.sessions() as session:
        owner = assistants.get_assistant(session, team_id, assistant)
        move = _roll_back(session, owner, to, "", "")  # never committed: only looking
        target = versions.get_version(session, owner, move.to_version_id)
    verify_files(context, target)
    return RollbackPlan(owner, target, to)


def await_serving(context: Context, assistant_id: str, alias: str, version_id: str) -> bool:
    """Whether the version answers for the alias within SERVING_SECONDS."""
    context.controller.nudge()
    return context.controller.wait_serving(assistant_id, alias, version_id, SERVING_SECONDS)


def _roll_back(
    session: Session, assistant: Assistant, to: str | int | None, reason: str, actor: str
) -> AliasMove:
    version = None if to is None else versions.get_version(session, assistant, to)
    return aliases.roll_back(session, assistant, to=version, reason=reason, actor=actor)
