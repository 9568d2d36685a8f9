"""The OpenAI-compatible way in: completions of assistants, whichever version answers at the moment."""

import json
import time
from collections.abc import Set
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from api.admission import Place
from api.context import Context, Ctx, Team
from api.errors import domain_error_response, error_response
from api.gateway_fields import CHAT_FORWARDED, TEXT_FORWARDED, forwarded
from api.routes.models import model_not_found
from api.traffic import Side
from api.upstream import (
    CLIENT_CLOSED_REQUEST,
    EngineStream,
    Upstream,
    engine_refusal,
    open_upstream,
    rewrite_reply,
    unless_disconnected,
)
from domain.errors import EngineUnavailable, InvalidInput, NotFound, RatchetError
from domain.version import CHAMPION, ModelName
from registry import aliases, assistants, versions
from registry.serving import wanted_version
from serving.routes import NOT_ROUTED, Lease

router = APIRouter(tags=["openai"])

USER_HEADER = "x-ratchet-user"


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, context: Ctx, team_id: Team) -> Response:
    return await _answer(request, Call(context, team_id), "/v1/chat/completions", CHAT_FORWARDED)


@router.post("/v1/completions")
async def completions(request: Request, context: Ctx, team_id: Team) -> Response:
    return await _answer(request, Call(context, team_id), "/v1/completions", TEXT_FORWARDED)


class Call:
    """One completion: who answers it, and its figures in the metrics."""

    def __init__(self, context: Context, team_id: str) -> None:
        self.context = context
        self.team_id = team_id
        self.assistant = ""
        """Empty until the model is known to exist: labels of metrics must stay few."""
        self.version = ""
        self._started_at = time.perf_counter()
        self._place: Place | None = None
        self._side: Side | None = None
        self._lease: Lease | None = None
        self._asked_at = self._began_at = 0.0

    def share_out(self, name: ModelName, user: str | None) -> ModelName:
        """What answers for a bare assistant's name: its champion, or for some users the canary."""
        self._side = self.context.traffic.choose(self.team_id, name.assistant, user)
        return name if self._side is None else ModelName(name.assistant, self._side.alias, None)

    async def enter(self, request: Request, name: ModelName) -> bool:
        """Take a place among the completions under way, or wait for one; False when the client left
        meanwhile. Raises Overloaded."""
        admission, assistant = self.context.admission, (self.team_id, name.assistant)
        self._place = admission.enter_now(assistant)
        if self._place is None:
            if (*assistant, CHAMPION) in self.context.routes.routes.aliases:
                self.assistant = name.assistant
            self._place = await unless_disconnected(request, admission.enter(assistant))
        self._asked_at = time.perf_counter()
        return self._place is not None

    async def lease(self, name: ModelName, lost: bool, avoid: Set[str]) -> Lease:
        """A version that answers for `name`, held until released, preferably not by an engine in `avoid`.

        The database is asked only for what is not routed: a version without an alias, which is loaded on
        demand, or one that its engine `lost`. Raises NotFound, EngineUnavailable, CorruptArtifact.
        """
        routes = self.context.routes
        lease = None
        if not lost:
            try:
                lease = routes.lease(self.team_id, name, avoid)
            except EngineUnavailable as error:
                if error.code != NOT_ROUTED:
                    raise
        if lease is None:
            number = await run_in_threadpool(self._load, name)
            try:
                lease = routes.lease(self.team_id, ModelName(name.assistant, None, number), avoid)
            except EngineUnavailable as error:  # gone again in this moment
                raise EngineUnavailable(error.message) from error
        self.assistant, self.version = name.assistant, f"v{lease.version_number}"
        self._lease = lease
        return lease

    def _load(self, name: ModelName) -> int:
        """Number of the version that `name` means, once it answers."""
        with self.context.reads() as session:
            try:
                number = _number(session, self.team_id, name)
                wanted = wanted_version(session, self.team_id, name.assistant, number)
            except NotFound as error:
                raise model_not_found(_spelled(name)) from error
        self.assistant = name.assistant
        self.context.controller.ensure_loaded(wanted)
        return number

    def began(self) -> None:
        """The first byte of the reply is here."""
        self._began_at = time.perf_counter()
        seconds = self._began_at - self._started_at
        self.context.metrics.gateway_first_byte_seconds.labels(self.assistant).observe(seconds)

    def ended(self, status: int) -> None:
        if self._place is not None:
            self._place.release()
        # What the client did wrong, or gave up, says nothing about the version.
        if self._side is not None and self._lease is not None and (status == 200 or status >= 500):
            latency = self._began_at - self._asked_at if status == 200 else None
            self.context.traffic.record(self._side, self._lease, latency)
        metrics = self.context.metrics
        metrics.gateway_requests.labels(self.assistant, self.version, str(status)).inc()
        metrics.gateway_seconds.labels(self.assistant).observe(time.perf_counter() - self._started_at)


async def _answer(request: Request, call: Call, path: str, allowed: frozenset[str]) -> Response:
    try:
        response = await _forward(request, call, path, allowed)
    except InvalidInput as error:  # OpenAI's clients know a wrong field as 400
        response = error_response(400, error.message, param=error.param, code=error.code)
    except RatchetError as error:
        response = domain_error_response(error)
    except BaseException:
        call.ended(500)
        raise
    if not isinstance(response, EngineStream):
        call.ended(response.status_code)
    if call.version:
        response.headers["x-model-version"] = call.version
    return response


async def _forward(request: Request, call: Call, path: str, allowed: frozenset[str]) -> Response:
    body = _json_object(await request.body())
    model = body.get("model")
    if not isinstance(model, str):
        raise InvalidInput("'model' must name an assistant.", param="model")
    if not isinstance(body.get("stream"), bool | None):
        raise InvalidInput("'stream' must be true or false.", param="stream")
    payload = forwarded(body, allowed, scores_prompts=call.context.settings.scores_prompts)
    try:
        name = ModelName.parse(model)
    except InvalidInput as error:
        raise model_not_found(model) from error
    user = _user(body, request)
    if "@" not in model:
        name = call.share_out(name, user)
    if not await call.enter(request, name):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    upstream = await unless_disconnected(
        request,
        open_upstream(
            call.context.engines,
            call.context.routes,
            lambda lost, avoid: call.lease(name, lost, avoid),
            path,
            payload,
            request.state.request_id,
            call.context.patience,
        ),
    )
    if upstream is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    call.began()
    if payload.get("stream") and upstream.response.is_success:
        return EngineStream(upstream, model, on_end=call.ended)
    return await _whole_reply(request, upstream, model)


async def _whole_reply(request: Request, upstream: Upstream, model: str) -> Response:
    try:
        content = await unless_disconnected(request, upstream.read())
    finally:
        await upstream.aclose()
    if content is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not upstream.response.is_success:
        return engine_refusal(upstream, content, model)
    return JSONResponse(rewrite_reply(content, model))


def _number(session: Session, team_id: str, name: ModelName) -> int:
    """Raises NotFound. An assistant's id is no model name."""
    if name.version is not None:
        return name.version
    assistant = assistants.get_assistant(session, team_id, name.assistant)
    alias = aliases.get_alias(session, assistant, name.alias or CHAMPION)
    return versions.get_version(session, assistant, alias.version_id).number


def _spelled(name: ModelName) -> str:
    if name.version is not None:
        return f"{name.assistant}@v{name.version}"
    return name.assistant if name.alias == CHAMPION else f"{name.assistant}@{name.alias}"


def _user(body: dict[str, Any], request: Request) -> str | None:
    """Whom the request is for, as its client says; the same user stays with the same version."""
    for field in ("safety_identifier", "user"):
        given = body.get(field)
        if not isinstance(given, str | None):
            raise InvalidInput(f"'{field}' must be a string.", param=field)
        if given:
            return given
    return request.headers.get(USER_HEADER) or None


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("The request body is not valid JSON.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidInput("The request body is not a JSON object.")
    return value
