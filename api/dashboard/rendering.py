"""Templates, the few static files, and the headers that every page of the dashboard leaves with."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from api.dashboard.contexts import (
    AssistantPage,
    AssistantsPage,
    ErrorPage,
    RollbackPage,
    UpdatePage,
    VersionPage,
)

_API = Path(__file__).parent.parent
_MEDIA_TYPES = {
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "htmx.min.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing is loaded from elsewhere, nothing inline runs, and no other page may frame the buttons.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # "no-referrer" would turn the Origin of our own forms into "null".
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TEMPLATES: Final[dict[type, str]] = {
    AssistantsPage: "dashboard/assistants.html",
    AssistantPage: "dashboard/assistant.html",
    UpdatePage: "dashboard/update.html",
    VersionPage: "dashboard/version.html",
    RollbackPage: "dashboard/rollback.html",
    ErrorPage: "dashboard/error.html",
}

Page = AssistantsPage | AssistantPage | UpdatePage | VersionPage | RollbackPage | ErrorPage


@dataclass(frozen=True)
class StaticFile:
    body: bytes
    media_type: str
    digest: str
    """Part of the URL, so that browsers may keep the file for ever."""


def _read_static() -> dict[str, StaticFile]:
    files = {}
    for name, media_type in _MEDIA_TYPES.items():
        body = (_API / "static" / name).read_bytes()
        files[name] = StaticFile(body, media_type, hashlib.sha256(body).hexdigest()[:12])
    return files


STATIC = _read_static()


def _static_url(name: str) -> str:
    return f"/dashboard/static/{name}?{STATIC[name].digest}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_API / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["static"] = _static_url
    environment.globals["ui"] = environment.get_template("dashboard/_macros.html").module
    return environment


ENVIRONMENT = _environment()


def render(page: Page, status: int = 200) -> HTMLResponse:
    template = ENVIRONMENT.get_template(TEMPLATES[type(page)])
    return HTMLResponse(template.render(page=page), status, _HEADERS)


def static_response(request: Request, file: StaticFile) -> Response:
    headers = {
        "ETag": f'"{file.digest}"',
        "Cache-Control": "public, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
