"""The Celery app: `celery -A worker.app worker`.

A message carries an update's id and nothing else. It may be lost, doubled or late without harm: the
database decides who runs what (registry.updates.claim), and the dispatcher nudges again.
"""

import logging
from typing import Any

from celery import Celery
from celery.signals import after_setup_logger, worker_init, worker_process_init, worker_shutting_down

from domain.settings import Settings
from worker import shutdown

QUEUE = "celery"
BROKER_PATIENCE_SECONDS = 2.0
"""A publisher gives up on a broker that does not answer (measured: without it, a frozen one hangs it)."""

app = Celery("worker", broker=Settings().resolved_broker_url, include=["worker.tasks"])
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_default_queue=QUEUE,
    task_acks_late=False,
    task_publish_retry=False,
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    worker_max_tasks_per_child=1,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"socket_timeout": BROKER_PATIENCE_SECONDS, "max_retries": 0},
)


@after_setup_logger.connect  # type: ignore[untyped-decorator]
def quieten(**_: Any) -> None:
    """An evaluation is thousands of requests, and httpx tells of each."""
    logging.getLogger("httpx").setLevel(logging.WARNING)


worker_init.connect(shutdown.prepare)
worker_process_init.connect(shutdown.enter_child)
worker_shutting_down.connect(shutdown.announce)
