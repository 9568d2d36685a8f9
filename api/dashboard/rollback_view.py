"""The form that asks for a rollback: what serves, what would serve, and why."""

from collections.abc import Sequence

from api.dashboard.contexts import RollbackPage, RollbackTarget
from api.dashboard.links import assistant_url, crumbs, rollback_url
from registry.tables import Version


def rollback_page(
    assistant: str, line: Sequence[Version], *, revision: int, token: str, error: str | None
) -> RollbackPage:
    """`line` are the versions that led to the champion, oldest first, the champion last.

    The version before the champion is preselected, as a rollback without a target would choose it.
    """
    champion = line[-1]
    earlier = list({version.number: version for version in reversed(line[:-1])}.values())
    earlier = [version for version in earlier if version.id != champion.id]
    targets = [
        RollbackTarget(version.number, _describe(version), selected=index == 0)
        for index, version in enumerate(earlier)
    ]
    if not targets and error is None:
        error = f"{assistant} has served nothing but v{champion.number}: there is nothing to roll back to."
    return RollbackPage(
        title=f"Roll back {assistant}",
        crumbs=crumbs(assistant, "roll back"),
        assistant=assistant,
        action=rollback_url(assistant),
        back_url=assistant_url(assistant),
        from_version=f"v{champion.number}",
        to_version=targets[0].text if targets else None,
        targets=targets,
        revision=revision,
        token=token,
        error=error,
    )


def _describe(version: Version) -> str:
    return f"v{version.number}" + (" (base model)" if version.kind == "base" else "")
