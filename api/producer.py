"""Nudges the workers through Celery. The database decides; a lost nudge only costs one sweep."""

import logging

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

RUN_UPDATE = "worker.run_update"
"""Name of the worker's task; its one argument is the update's id."""
_TRANSPORT = {"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 0}
"""A frozen broker must not hold up a reply (kombu's own default waits without end)."""


class UpdateProducer:
    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("ratchet-api", broker=broker_url, set_as_current=False)
        self._celery.conf.update(
            task_serializer="json",
            task_ignore_result=True,
            broker_transport_options=_TRANSPORT,
            broker_connection_retry=False,
        )

    def nudge(self, update_id: str) -> None:
        """Tell a worker about the update; without a broker the dispatcher's sweep finds it."""
        try:
            self._celery.send_task(RUN_UPDATE, args=[update_id], retry=False, ignore_result=True)
        except (OperationalError, RedisError, OSError) as error:
            logger.warning("broker not reached, %s waits for the dispatcher: %s", update_id, error)

    def broker_error(self) -> str | None:
        """None when the broker answers a ping within two seconds, else why not."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.default_channel.client.ping()
        except (OperationalError, RedisError, OSError) as error:
            return str(error) or type(error).__name__
        return None

    def close(self) -> None:
        self._celery.close()
