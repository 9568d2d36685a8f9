"""The one table from domain errors to HTTP, and the one shape in which every error leaves."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from domain.errors import (
    AlreadyExists,
    ArtifactsUnavailable,
    CanaryCoolingDown,
    Conflict,
    CorruptArtifact,
    DemonstrationsRejected,
    EngineTimeout,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    NothingToRollBackTo,
    NothingToTeach,
    Overloaded,
    RatchetError,
    RevisionMismatch,
    StaleFence,
    TrainingFailed,
    TrainingRefused,
    UnknownBaseModel,
    UpdateCancelled,
)
from registry.session import LedgerError, is_away

logger = logging.getLogger(__name__)

STATUS: dict[type[RatchetError], int] = {
    InvalidInput: 422,
    DemonstrationsRejected: 422,
    UnknownBaseModel: 422,
    NotFound: 404,
    Conflict: 409,
    AlreadyExists: 409,
    NothingToTeach: 409,
    NothingToRollBackTo: 409,
    RevisionMismatch: 412,
    CanaryCoolingDown: 409,
    StaleFence: 409,
    UpdateCancelled: 409,
    CorruptArtifact: 409,
    ArtifactsUnavailable: 503,
    TrainingRefused: 409,
    TrainingFailed: 500,
    EngineUnavailable: 503,
    EngineTimeout: 504,
    Overloaded: 429,
}

LEDGER_AWAY = "The database does not answer; try again shortly."

_HTTP_CODES = {
    400: "bad_request",
    403: "forbidden",
    404: "unknown_url",
    405: "method_not_allowed",
    412: "precondition_failed",
    413: "content_too_large",
    415: "unsupported_media_type",
}
_MOST_LINES = 1000
"""Bad lines listed one by one in a reply; the message still counts all of them."""


def status_of(error: type[RatchetError]) -> int:
    """HTTP status of a domain error; a subclass without an entry has its parent's."""
    for ancestor in error.__mro__:
        if ancestor in STATUS:
            return STATUS[ancestor]
    raise LookupError(f"{error.__name__} is missing in api.errors.STATUS")


def error_body(status: int, message: str, *, param: str | None, code: str | None) -> dict[str, Any]:
    kind = "invalid_request_error"
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


def domain_error_response(error: RatchetError, status: int | None = None) -> JSONResponse:
    """With the table's status, or another one where a contract has its own."""
    if status is None:
        status = status_of(type(error))
    body = error_body(status, error.message, param=error.param, code=error.code)
    if isinstance(error, DemonstrationsRejected):
        body["error"]["lines"] = [line.model_dump() for line in error.lines[:_MOST_LINES]]
    return JSONResponse(body, status, _retry_headers(error, status))


def _retry_headers(error: RatchetError, status: int) -> dict[str, str]:
    """When to ask again. OpenAI's clients repeat a 504 by themselves unless told not to, and an engine that
    is too slow would then do the same work several times."""
    if status == 504:
        return {"x-should-retry": "false"}
    seconds = error.retry_after_seconds
    if seconds is None and status == 503:
        seconds = 1.0
    return {} if seconds is None else {"retry-after": str(math.ceil(seconds))}


def invalid_input(error: ValidationError, *, under: str) -> InvalidInput:
    """A pydantic error found inside the field `under`, as the domain error that names the inner field."""
    param, message = _describe([{**found, "loc": (under, *found["loc"])} for found in error.errors()])
    return InvalidInput(message, param=param)


def invalid_request_response(error: RequestValidationError, status: int) -> JSONResponse:
    """What FastAPI found wrong with a request; 400 when its body is not JSON."""
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        return error_response(400, "The request body is not valid JSON.", code="invalid_json")
    param, message = _describe([{**one, "loc": one["loc"][1:]} for one in found])
    return error_response(status, message, param=param, code=InvalidInput.code)


def internal_error() -> JSONResponse:
    """Says nothing about the cause: that is in the log under the request's id."""
    return error_response(
        500, "Ratchet failed to handle the request; its log names the cause.", code="internal_error"
    )


def install(app: FastAPI) -> None:
    @app.exception_handler(RatchetError)
    def on_domain_error(request: Request, error: RatchetError) -> JSONResponse:
        if status_of(type(error)) >= 500:
            logger.error("%s %s: %s", request.method, request.url.path, error.message)
        return domain_error_response(error)

    # Async: it must not wait for one of the threads, which may all be waiting for the database.
    @app.exception_handler(LedgerError)
    async def on_ledger_error(request: Request, error: LedgerError) -> JSONResponse:
        if not is_away(error):
            raise error
        logger.error("%s %s: %s", request.method, request.url.path, str(error).partition("\n")[0])
        return error_response(503, LEDGER_AWAY, code="database_unavailable", headers={"retry-after": "1"})

    @app.exception_handler(RequestValidationError)
    def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_request_response(error, 422)

    @app.exception_handler(HTTPException)
    def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not answer {request.method}"
        code = _HTTP_CODES.get(error.status_code, "http_error")
        return error_response(error.status_code, message, code=code, headers=dict(error.headers or {}))


def _describe(found: Sequence[Any]) -> tuple[str | None, str]:
    """The first field's dotted path, and every complaint in one line."""
    complaints: list[tuple[str | None, str]] = []
    for one in found:
        path = ".".join(str(part) for part in one["loc"]) or None
        message = str(one["msg"]).removeprefix("Value error, ")
        complaints.append((path, f"{path}: {message}" if path else message))
    return complaints[0][0], "; ".join(text for _, text in complaints[:10])
