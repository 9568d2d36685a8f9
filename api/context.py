"""What the routes share: settings, database sessions, version files, serving and the broker."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import aiohttp
from anyio import CapacityLimiter
from fastapi import Depends, Request
from sqlalchemy.orm import Session, sessionmaker

from api.admission import Admission
from api.loads import Loads
from api.metrics import Metrics
from api.producer import UpdateProducer
from api.prompt_length import PromptLengths
from api.shadow import Shadows
from api.traffic import TrafficControl
from api.traffic_keeper import TrafficKeeper
from api.upstream import Patience
from artifacts.version_store import VersionStore
from domain.settings import Settings
from serving.controller import SwapController
from serving.routes import RouteTable

ACTOR = "user"
"""Who moves things through the API, in history and audit log."""
TEAM_ID = "team_default"
"""The team of the first migration: there is no authentication yet, and only loopback is served."""


@dataclass(frozen=True)
class Context:
    settings: Settings
    sessions: sessionmaker[Session]
    """For what writes, or tries a write without committing it."""
    reads: sessionmaker[Session]
    """For what only reads: on SQLite these wait for no writer."""
    store: VersionStore
    routes: RouteTable
    controller: SwapController
    loads: Loads
    producer: UpdateProducer
    prompts: PromptLengths
    engines: aiohttp.ClientSession
    """The gateway's connections to the inference engines."""
    patience: Patience
    admission: Admission
    traffic: TrafficControl
    keeper: TrafficKeeper
    shadows: Shadows
    metrics: Metrics
    parsing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    """Of the threads that read large completions: one at a time, to leave the CPU to others."""
    idempotency_keys_in_flight: set[tuple[str, str]] = field(default_factory=set)
    """(team, key) of the creating requests that this process is handling."""


# Async, though they wait for nothing: a plain function would cost the gateway a thread per request.
async def get_context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def team_id() -> str:
    return TEAM_ID


Ctx = Annotated[Context, Depends(get_context)]
Team = Annotated[str, Depends(team_id)]


def _reading(context: Ctx) -> Iterator[Session]:
    with context.reads() as session:
        yield session


# Scope "function": closed before the reply leaves, so that a slow reader holds no transaction.
Reading = Annotated[Session, Depends(_reading, scope="function")]
"""A session that can only read."""
