"""What one update was asked for, read once as plain values, so that no later stage holds a session."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.version import Checkpoint
from registry.assistants import get_assistant
from registry.engines import checkpoint_of
from registry.updates import Claim, get_update
from registry.versions import get_version


@dataclass(frozen=True)
class Brief:
    update_id: str
    team_id: str
    assistant_id: str
    assistant: str
    base_model: str
    skills: list[str]
    """Taught by this update."""
    recipe: Recipe
    gate: GateRules
    publish: str
    parent_id: str
    parent_number: int
    parent_manifest_sha256: str | None
    """None when the parent is the bare base model."""
    parent_kind: str
    checkpoint: Checkpoint | None
    """The full version that the parent is or lies on; None where that is the base model itself."""
    base_id: str
    """The version v0."""
    published: str | None
    """Id of the version that an earlier claim of this update already published."""


def read_brief(session: Session, claim: Claim) -> Brief:
    update = get_update(session, claim.team_id, claim.update_id)
    assistant = get_assistant(session, claim.team_id, update.assistant_id)
    base = get_version(session, assistant, 0)
    parent = get_version(session, assistant, update.parent_version_id or base.id)
    whole = checkpoint_of(session, parent)
    return Brief(
        update_id=update.id,
        team_id=claim.team_id,
        assistant_id=assistant.id,
        assistant=assistant.name,
        base_model=assistant.base_model,
        skills=list(update.skills),
        recipe=Recipe.model_validate(update.recipe),
        gate=GateRules.model_validate(update.gate),
        publish=update.publish,
        parent_id=parent.id,
        parent_number=parent.number,
        parent_manifest_sha256=parent.manifest_sha256,
        parent_kind=parent.kind,
        checkpoint=None
        if whole is None
        else Checkpoint(version_id=whole.id, manifest_sha256=whole.manifest_sha256),
        base_id=base.id,
        published=update.version_id,
    )
