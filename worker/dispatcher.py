"""Nudges Celery about updates that wait: `python -m worker.dispatcher`.

The database knows what waits; a message is only a hint, so this loop may crash, repeat itself or find
the broker gone, and the next sweep makes up for it.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from kombu.exceptions import KombuError, OperationalError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from domain.failpoint import failpoint
from domain.settings import Settings
from registry.claims import Patience
from registry.leases import DEFAULT_PATIENCE
from registry.session import make_engine, make_reading_sessions, make_sessions
from registry.updates import claimable
from worker.app import QUEUE, app
from worker.housekeeping import Housekeeper

logger = logging.getLogger(__name__)

RENUDGE_SECONDS = 5.0
"""How long a nudge may stay unanswered before the broker counts as having lost it."""


class Dispatcher:
    """Sends each waiting update's id once, and again only when the broker seems to have lost it.

    `send(update_id)` and `pending()`, the number of messages that wait in the broker, raise
    kombu's OperationalError when the broker does not answer.
    """

    def __init__(
        self,
        reads: sessionmaker[Session],
        *,
        send: Callable[[str], None],
        pending: Callable[[], int],
        patience: Patience = DEFAULT_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reads = reads
        self._send = send
        self._pending = pending
        self._patience = patience
        self._clock = clock
        self._nudged: dict[str, float] = {}

    def sweep(self) -> list[str]:
        """One look at the database; returns the ids that were sent."""
        with self._reads() as session:
            waiting = claimable(session, self._patience)
        # What was claimed since is forgotten: should it wait again (resumed, lease lost), it is sent at once.
        self._nudged = {update: at for update, at in self._nudged.items() if update in waiting}
        now = self._clock()
        due = [update for update in waiting if self._is_due(update, now)]
        for update in due:
            self._send(update)
            failpoint("dispatcher.sent")
            self._nudged[update] = now
        return due

    def _is_due(self, update: str, now: float) -> bool:
        at = self._nudged.get(update)
        if at is None:
            return True
        # While messages wait in the queue every worker is busy or away, and another one helps nobody.
        return now - at >= RENUDGE_SECONDS and self._pending() == 0


def send(update_id: str) -> None:
    app.send_task("worker.run_update", [update_id], retry=False)


def pending() -> int:
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        return int(app.amqp.queues[QUEUE].bind(channel).queue_declare().message_count)


def main() -> None:
    settings = Settings()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(name)s: %(message)s")
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        # Not set() in place: the main thread may hold the event's lock at this very moment.
        threading.Thread(target=ended.set).start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    ledger = make_engine(settings.resolved_database_url)
    reads = make_reading_sessions(ledger)
    # Of its own thread: removing large files must not hold up a nudge.
    housekeeper = Housekeeper(settings, make_sessions(ledger), reads)
    threading.Thread(target=housekeeper.run, args=(ended,), name="housekeeping", daemon=True).start()
    dispatcher = Dispatcher(
        reads,
        send=send,
        pending=pending,
        patience=Patience(tries=settings.update_tries, first_seconds=settings.retry_seconds),
    )
    logger.info("dispatching every %g s", settings.sweep_seconds)
    while not ended.wait(settings.sweep_seconds):
        try:
            for update in dispatcher.sweep():
                logger.info("nudged %s", update)
        except (SQLAlchemyError, KombuError, OperationalError, OSError) as error:
            logger.warning("sweep failed, next one in %g s: %s", settings.sweep_seconds, error)


if __name__ == "__main__":
    main()
