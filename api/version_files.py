"""What must be whole before an alias may point at a version."""

from api.context import Context
from registry import engines, retention, serving
from registry.tables import Version


def verify_files(context: Context, version: Version) -> None:
    """Compare every byte of the version, and of the full version that it lies on unless an engine runs that,
    which was compared when the engine started. Retention leaves both alone from before the first look.

    Takes seconds for large versions: for no transaction. Raises CorruptArtifact, ArtifactsUnavailable,
    Conflict(code="version_pruned").
    """
    if version.manifest_sha256 is None:
        return
    needed = [version]
    with context.sessions.begin() as session:
        retention.use(session, version.id)
        below = engines.checkpoint_of(session, version)
        running = {replica.base_model for replica in serving.replicas(session)}
        if below is not None and below.id != version.id and below.id not in running:
            retention.use(session, below.id)
            needed.append(below)
    for one in needed:
        context.store.verify(one.id, one.manifest_sha256 or "")
