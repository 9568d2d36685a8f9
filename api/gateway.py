"""The OpenAI-compatible way in: completions of assistants, whichever version answers at the moment."""

import asyncio
import json
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from api.call import Call
from api.context import Ctx, Team
from api.engine_replies import CLIENT_CLOSED_REQUEST, EngineStream, engine_refusal, rewrite_reply
from api.errors import domain_error_response, error_response
from api.gateway_fields import CHAT_FORWARDED, TEXT_FORWARDED, forwarded
from api.routes.models import model_not_found
from api.upstream import Upstream, unless_disconnected
from domain.errors import InvalidInput, RatchetError
from domain.large_json import LARGE_BYTES, loads
from domain.version import ModelName

router = APIRouter(tags=["openai"])

USER_HEADER = "x-ratchet-user"


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, context: Ctx, team_id: Team) -> Response:
    return await _answer(request, Call(request, context, team_id, "/v1/chat/completions"), CHAT_FORWARDED)


@router.post("/v1/completions")
async def completions(request: Request, context: Ctx, team_id: Team) -> Response:
    return await _answer(request, Call(request, context, team_id, "/v1/completions"), TEXT_FORWARDED)


async def _answer(request: Request, call: Call, allowed: frozenset[str]) -> Response:
    try:
        response = await _forward(request, call, allowed)
    except InvalidInput as error:  # OpenAI's clients know a wrong field as 400
        response = error_response(400, error.message, param=error.param, code=error.code)
    except RatchetError as error:
        response = domain_error_response(error)
    except asyncio.CancelledError:
        call.ended(CLIENT_CLOSED_REQUEST)
        raise
    except BaseException:
        call.ended(500)
        raise
    if not isinstance(response, EngineStream):
        call.ended(response.status_code)
    if call.version:
        response.headers["x-model-version"] = call.version
    return response


async def _forward(request: Request, call: Call, allowed: frozenset[str]) -> Response:
    content = await request.body()
    if len(content) > LARGE_BYTES:
        body = await to_thread.run_sync(_json_object, content, limiter=call.context.parsing)
    else:
        body = _json_object(content)
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
    upstream = await call.open(name, payload)
    if upstream is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if payload.get("stream") and upstream.succeeded:
        on_line = None if call.transcript is None else call.transcript.add_line
        return EngineStream(upstream, model, on_line=on_line, on_end=call.ended)
    return await _whole_reply(request, call, upstream, model)


async def _whole_reply(request: Request, call: Call, upstream: Upstream, model: str) -> Response:
    try:
        content = await unless_disconnected(request.receive, upstream.read())
    finally:
        upstream.close()
    if content is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if not upstream.succeeded:
        return engine_refusal(upstream, content, model)
    reply = rewrite_reply(content, model)
    if call.transcript is not None:
        call.transcript.add_reply(reply)
    return JSONResponse(reply)


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
        value = loads(content, parse_constant=_no_number)
        # Half of a surrogate pair is no character: it could not be sent on.
        if b"\\ud" in content.lower() or b"\xed" in content:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidInput("The request body is not valid JSON.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidInput("The request body is not a JSON object.")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
