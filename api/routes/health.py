"""Whether this process lives, whether the installation can do its work, and its metrics."""

import logging
from typing import Any

import httpx
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError

from api.context import Context, Ctx
from registry import serving

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operations"])

ENGINE_SECONDS = 2.0


# Async: whether the process lives shall not wait for threads that wait for the database.
@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers. Says nothing about what it depends on."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(context: Ctx) -> Response:
    """200 when the database and the broker answer and every base model in use has a living engine."""
    checks: dict[str, Any] = {"broker": _check(context.producer.broker_error())}
    try:
        engines = _engine_urls(context)
    except SQLAlchemyError as error:
        logger.error("database not reached: %s", error)
        checks["database"] = _check(type(error).__name__)
    else:
        checks["database"] = _check(None)
        checks["engines"] = {base_model: _check(_engines_error(urls)) for base_model, urls in engines.items()}
    ready = all(_flatten(checks))
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


@router.get("/metrics")
def metrics(context: Ctx) -> Response:
    return Response(generate_latest(context.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _engine_urls(context: Context) -> dict[str, list[str]]:
    """Urls of the replicas by base model in use."""
    with context.reads() as session:
        used = serving.base_models_in_use(session)
        replicas = serving.replicas(session)
    return {name: [one.url for one in replicas if one.base_model == name] for name in used}


def _engines_error(urls: list[str]) -> str | None:
    """None when one of them answers."""
    if not urls:
        return "no engine is registered"
    problems = []
    for url in urls:
        try:
            reply = httpx.get(f"{url.rstrip('/')}/health", timeout=ENGINE_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            problems.append(str(error) or type(error).__name__)
        else:
            if reply.is_success:
                return None
            problems.append(f"HTTP {reply.status_code}")
    return "; ".join(problems)


def _check(error: str | None) -> dict[str, Any]:
    return {"ok": error is None, "error": error}


def _flatten(checks: dict[str, Any]) -> list[bool]:
    if "ok" in checks:
        return [bool(checks["ok"])]
    return [ok for inner in checks.values() for ok in _flatten(inner)]
