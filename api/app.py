"""The application: what starts and stops with it, and which routes it answers."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

from api import errors, gateway
from api.admission import Admission
from api.context import Context
from api.dashboard import router as dashboard
from api.edge import Edge
from api.loads import Loads
from api.metrics import Metrics
from api.outbox_sender import OutboxSender
from api.producer import UpdateProducer
from api.prompt_length import PromptLengths
from api.routes import (
    aliases,
    assistants,
    audit,
    demonstrations,
    events,
    files,
    fine_tuning,
    health,
    measurements,
    models,
    skills,
    traffic,
    updates,
    versions,
    webhooks,
)
from api.shadow import Shadows
from api.swaps import make_controller
from api.traffic import TrafficControl
from api.traffic_keeper import TrafficKeeper
from api.upstream import Patience, engine_client
from artifacts.opening import open_store
from domain.settings import Settings
from registry.session import make_engine, make_reading_sessions, make_sessions
from serving.routes import RouteTable

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the database, broker and artifacts that `settings` (default: the environment) name.

    Nothing is opened before the application starts. The database must be migrated already.
    """
    chosen = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        _configure_logging(chosen.log_level)
        with ExitStack() as stack:
            engine = make_engine(chosen.resolved_database_url)
            stack.callback(engine.dispose)
            sessions, reads = make_sessions(engine), make_reading_sessions(engine)
            store = open_store(chosen)
            producer = UpdateProducer(chosen.resolved_broker_url)
            stack.callback(producer.close)
            routes = RouteTable()
            controller = stack.enter_context(make_controller(chosen, sessions, reads, store, routes))
            admission = Admission(
                places=chosen.gateway_places,
                places_per_assistant=chosen.gateway_places_per_assistant,
                queue=chosen.gateway_queue,
                queue_seconds=chosen.gateway_queue_seconds,
            )
            control = TrafficControl(routes, metrics)
            keeper = TrafficKeeper(control, sessions, reads)
            async with engine_client(chosen) as engines:
                shadows = Shadows(engines, routes, control, admission, chosen)
                app.state.context = Context(
                    settings=chosen,
                    sessions=sessions,
                    reads=reads,
                    store=store,
                    routes=routes,
                    controller=controller,
                    loads=Loads(controller),
                    producer=producer,
                    prompts=PromptLengths(chosen.cache_dir),
                    engines=engines,
                    patience=Patience.from_settings(chosen),
                    admission=admission,
                    traffic=control,
                    keeper=keeper,
                    shadows=shadows,
                    metrics=metrics,
                )
                metrics.watch_serving(lambda: _serving(routes))
                metrics.watch_admission(admission)
                sender = OutboxSender(sessions, reads, trusted_hosts=chosen.webhook_trusted_hosts)
                tasks = [
                    asyncio.create_task(sender.run(), name="sending webhooks"),
                    asyncio.create_task(keeper.run(), name="keeping the traffic plans"),
                ]
                for task in tasks:
                    task.add_done_callback(_report_end)
                yield
                for task in tasks:
                    task.cancel()
                await shadows.aclose()
                await asyncio.wait(tasks)

    app = FastAPI(
        title="Ratchet",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # the stock pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Edge, allowed_hosts=chosen.allowed_hosts, metrics=metrics)
    errors.install(app)
    for module in (
        gateway,  # routes are tried in turn: the busiest first
        assistants,
        skills,
        demonstrations,
        updates,
        events,
        versions,
        measurements,
        aliases,
        traffic,
        models,
        files,
        fine_tuning,
        webhooks,
        audit,
        health,
    ):
        app.include_router(module.router)
    app.include_router(dashboard)
    return app


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        logger.error("%s has ended", task.get_name(), exc_info=task.exception())


def _configure_logging(level: str) -> None:
    """Does nothing where the process that starts the application has its own handlers."""
    logging.basicConfig(level=level, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every look at an engine


def _serving(table: RouteTable) -> list[tuple[str, str, int]]:
    """(assistant, alias, version number) as the gateway routes them now."""
    return [
        (assistant, alias, route.version_number)
        for (_, assistant, alias), route in table.routes.aliases.items()
    ]
