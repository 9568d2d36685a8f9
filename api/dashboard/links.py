"""URLs of the dashboard's pages."""

from urllib.parse import quote

from api.dashboard.contexts import Crumb, VersionLink

ROOT = "/dashboard"


def assistant_url(name: str) -> str:
    return f"{ROOT}/assistants/{quote(name, safe='')}"


def rollback_url(name: str) -> str:
    return f"{assistant_url(name)}/rollback"


def version_url(name: str, number: int) -> str:
    return f"{assistant_url(name)}/versions/{number}"


def update_url(name: str, update_id: str) -> str:
    return f"{assistant_url(name)}/updates/{quote(update_id, safe='')}"


def suite_url(name: str, number: int, anchor: str) -> str:
    """A version's page with one suite unfolded."""
    return f"{version_url(name, number)}?open={quote(anchor, safe='')}#{anchor}"


def anchor(kind: str, suite: str) -> str:
    """Id of a suite's measurements on a version's page."""
    return f"{kind}-{suite}"


def version_link(name: str, number: int) -> VersionLink:
    return VersionLink(f"v{number}", version_url(name, number))


def crumbs(name: str | None = None, leaf: str | None = None) -> list[Crumb]:
    """The path of a page: all assistants, the assistant, what of it."""
    path = [Crumb("Assistants", ROOT if name is not None else None)]
    if name is not None:
        path.append(Crumb(name, assistant_url(name) if leaf is not None else None))
    if leaf is not None:
        path.append(Crumb(leaf, None))
    return path
