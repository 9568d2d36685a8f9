"""Routes of the dashboard. Each reads in one short session, which is closed before anything is rendered."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session

from api.context import Context, Ctx, Team
from api.dashboard.assistant_view import assistant_page
from api.dashboard.contexts import ErrorPage, UpdateCard
from api.dashboard.forms import ForeignForm, form_token, keep_token, require_own_form
from api.dashboard.links import ROOT, assistant_url, crumbs, version_link
from api.dashboard.matrix_view import NEWEST_COLUMNS
from api.dashboard.rendering import STATIC, render, static_response
from api.dashboard.rollback_view import rollback_page
from api.dashboard.serving_view import assistants_page
from api.dashboard.traffic_view import traffic_panel
from api.dashboard.update_view import step_lines, update_card, update_page
from api.dashboard.version_view import version_page
from api.errors import LEDGER_AWAY, status_of
from api.retention import retention
from api.rollback import await_serving, plan_rollback
from domain.errors import Conflict, CorruptArtifact, NotFound, RatchetError
from domain.version import CHAMPION
from registry import (
    aliases,
    assistants,
    measurements,
    overview,
    traffic,
    traffic_figures,
    updates,
    versions,
)
from registry.session import LedgerError, db_now, is_away
from registry.tables import Assistant, Update

ACTOR = "dashboard"
ASSISTANTS_PER_PAGE = 50
NEWEST_UPDATES = 8
NEWEST_MOVES = 12
NEWEST_ANCESTORS = 30
NEWEST_TARGETS = 100
"""Of a rollback; an older one is chosen by the API."""
NEWEST_EVENTS = 200
NEWEST_STEPS = 5000


class _Route(APIRoute):
    """Errors leave as pages, not as JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_show(request: Request) -> Response:
            try:
                return await handle(request)
            except RatchetError as error:
                return _error_page(status_of(type(error)), error.message)
            except LedgerError as error:
                if not is_away(error):
                    raise
                return _error_page(503, LEDGER_AWAY)
            except ForeignForm as error:
                return _error_page(403, str(error))
            except RequestValidationError:
                return _error_page(422, "The address or the form is not one that this dashboard wrote.")

        return handle_or_show


router = APIRouter(prefix=ROOT, route_class=_Route, include_in_schema=False)


@router.get("")
def list_assistants(
    request: Request, context: Ctx, team_id: Team, after: Annotated[str | None, Query(max_length=128)] = None
) -> Response:
    with context.reads() as session:
        found = assistants.list_assistants(session, team_id, after, ASSISTANTS_PER_PAGE)
        page = assistants_page(
            overview.overviews(session, found.rows),
            after=after,
            has_more=found.has_more,
            api_url=_api_url(request),
            now=db_now(session),
        )
    return render(page)


@router.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    if name not in STATIC:
        raise HTTPException(404)
    return static_response(request, STATIC[name])


@router.get("/assistants/{name}")
def show_assistant(
    request: Request,
    context: Ctx,
    team_id: Team,
    name: str,
    versions_shown: Annotated[str, Query(alias="versions", max_length=3)] = "",
    moved: int | None = None,
) -> Response:
    with context.reads() as session:
        assistant = assistants.get_assistant(session, team_id, name)
        now = db_now(session)
        [seen] = overview.overviews(session, [assistant])
        every = versions_shown == "all"
        columns = overview.shown_versions(
            session, assistant, seen.wanted, newest=None if every else NEWEST_COLUMNS
        )
        moves = overview.newest_moves(session, assistant, limit=NEWEST_MOVES)
        shown_updates = overview.newest_updates(session, assistant, limit=NEWEST_UPDATES)
        figures = traffic_figures.list_figures(session, assistant)
        pointers = aliases.list_aliases(session, assistant)
        numbers = versions.numbers_of(
            session,
            [
                *(id for move in moves for id in (move.from_version_id, move.to_version_id)),
                *(id for update in shown_updates for id in (update.parent_version_id, update.version_id)),
                *(one.version_id for one in figures),
                *(alias.version_id for alias in pointers),
            ],
        )
        page = assistant_page(
            seen,
            skills=overview.skill_overviews(session, assistant),
            versions=columns,
            numbers=numbers,
            retained=retention(session, seen.wanted).summary,
            measured=measurements.matrix(session, assistant, None if every else columns),
            taught=overview.taught_skills(session, assistant, None if every else columns),
            moves=moves,
            cards=[_card(session, assistant, update, numbers, now) for update in shown_updates],
            traffic=traffic_panel(
                assistant.name,
                traffic.get_traffic(session, assistant),
                figures,
                pointers,
                numbers,
                now,
            ),
            can_roll_back=aliases.rollback_target(session, assistant) is not None,
            every_version=every,
            moved=moved,
            api_url=_api_url(request),
            now=now,
        )
    return render(page)


@router.get("/assistants/{name}/versions/{number}")
def show_version(
    context: Ctx,
    team_id: Team,
    name: str,
    number: int,
    opened: Annotated[str | None, Query(alias="open", max_length=255)] = None,
    items: Annotated[str, Query(max_length=3)] = "",
) -> Response:
    with context.reads() as session:
        assistant = assistants.get_assistant(session, team_id, name)
        version = versions.get_version(session, assistant, number)
        page = version_page(
            assistant.name,
            version,
            versions.lineage_numbers(session, version, newest=NEWEST_ANCESTORS),
            [
                (row, measurements.items_of(session, row))
                for row in measurements.list_measurements(session, version)
            ],
            champion_id=aliases.get_alias(session, assistant, CHAMPION).version_id,
            opened=opened,
            every_item=items == "all",
            now=db_now(session),
        )
    return render(page)


@router.get("/assistants/{name}/updates/{update_id}")
def show_update(context: Ctx, team_id: Team, name: str, update_id: str) -> Response:
    with context.reads() as session:
        assistant = assistants.get_assistant(session, team_id, name)
        update = updates.get_update(session, team_id, update_id)
        if update.assistant_id != assistant.id:
            raise NotFound(f"'{name}' has no update '{update_id}'.", param="update")
        now = db_now(session)
        numbers = versions.numbers_of(session, [update.parent_version_id, update.version_id])
        page = update_page(
            update,
            _card(session, assistant, update, numbers, now),
            overview.newest_messages(session, update, limit=NEWEST_EVENTS),
            assistant=assistant.name,
            demonstrations=overview.count_demonstrations(session, update),
            now=now,
        )
    return render(page)


@router.get("/assistants/{name}/rollback")
def ask_roll_back(request: Request, context: Ctx, team_id: Team, name: str) -> Response:
    return _rollback_form(request, context, team_id, name, error=None)


@router.post("/assistants/{name}/rollback")
def roll_back(
    request: Request,
    context: Ctx,
    team_id: Team,
    name: str,
    token: Annotated[str, Form(max_length=64)],
    revision: Annotated[int, Form()],
    to: Annotated[int, Form(ge=0)],
    reason: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    require_own_form(request, token)
    try:
        plan = plan_rollback(context, team_id, name, to)
        with context.sessions.begin() as session:
            move = plan.carry_out(session, reason=reason.strip(), actor=ACTOR, seen_revision=revision)
    except (Conflict, CorruptArtifact) as error:
        return _rollback_form(request, context, team_id, name, error=error)
    await_serving(context, plan.assistant.id, CHAMPION, plan.target.id)
    return RedirectResponse(f"{assistant_url(plan.assistant.name)}?moved={move.revision}", 303)


def _rollback_form(
    request: Request, context: Context, team_id: str, name: str, *, error: RatchetError | None
) -> Response:
    token = form_token(request)
    with context.reads() as session:
        assistant = assistants.get_assistant(session, team_id, name)
        page = rollback_page(
            assistant.name,
            aliases.champion_line(session, assistant, newest=NEWEST_TARGETS + 1),
            revision=aliases.get_alias(session, assistant, CHAMPION).revision,
            token=token,
            error=error.message if error is not None else None,
        )
    response = render(page, 200 if error is None else status_of(type(error)))
    keep_token(request, response, token)
    return response


def _card(
    session: Session, assistant: Assistant, update: Update, numbers: Mapping[str, int], now: float
) -> UpdateCard:
    parent, made = update.parent_version_id, update.version_id
    metrics = overview.newest_steps(session, update, limit=NEWEST_STEPS)
    return update_card(
        update,
        step_lines(metrics),
        assistant=assistant.name,
        parent=version_link(assistant.name, numbers[parent]) if parent is not None else None,
        version=version_link(assistant.name, numbers[made]) if made is not None else None,
        now=now,
    )


def _api_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def _error_page(status: int, message: str) -> Response:
    title = "Not found" if status == 404 else "That did not work"
    return render(ErrorPage(title, crumbs(), message), status)
