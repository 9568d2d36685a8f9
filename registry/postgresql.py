"""How long a connection to PostgreSQL may be silent, for every engine of this room.

The kernel ends a connection whose packets nobody acknowledges. It cannot see a server that is frozen, nor a
proxy that acknowledges for a server it has lost (psycopg's issue 1371), and no clock tells these from a long
query or a wait for a lock. So a connection that heard nothing for a while asks whether the server still
answers others.
"""

import os
import socket
import struct
import time
from typing import Any

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, event

CONNECT_SECONDS = 5
SILENCE_SECONDS = 5.0
"""Of the server within a statement, until it is asked whether it answers at all."""
AGAIN_SECONDS = 1.0
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""The protocol's first question, which costs the server least: every server answers it by one letter."""
POOL_SECONDS = 10.0
"""Until one of the pool's connections is free."""
LIMITS = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's parameters, in seconds but for the last, which is in milliseconds; an URL may say otherwise."""


class Connection(psycopg.Connection[Any]):
    """Closes itself with an OperationalError when the server answers neither it nor anyone else.

    That takes SILENCE_SECONDS and the patience of one attempt to connect.
    """

    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._unless_away(gen), *args, **kwargs)

    def _unless_away(self, gen: PQGen[Any]) -> PQGen[Any]:
        try:
            wants = next(gen)
            heard_at = time.monotonic()
            while True:
                ready = yield wants
                now = time.monotonic()
                if ready:
                    heard_at = now
                elif now - heard_at > SILENCE_SECONDS:
                    self._require_answer(now - heard_at)
                    heard_at = time.monotonic()
                wants = gen.send(ready)
        except StopIteration as end:
            return end.value

    def _require_answer(self, silent_seconds: float) -> None:
        if _answers(self.fileno()):
            return
        self.close()
        raise psycopg.OperationalError(
            f"PostgreSQL said nothing for {silent_seconds:.0f} s and does not answer others either"
        )


def _answers(connected: int) -> bool:
    """Whether the server at the other end of this descriptor says a word to a new connection. Not asked by
    libpq's PQping, which lets no other thread run meanwhile."""
    with socket.socket(fileno=os.dup(connected)) as ours, socket.socket(ours.family) as asking:
        asking.settimeout(CONNECT_SECONDS)
        try:
            asking.connect(ours.getpeername())
            asking.sendall(SSL_REQUEST)
            return bool(asking.recv(1))
        except OSError:
            return False


class _Connecting:
    """Connects, except in the AGAIN_SECONDS after an attempt that nobody answered: else requests that wait
    for one of the pool's places would each wait for a timeout of their own, one after the other."""

    def __init__(self) -> None:
        self._again_at = self._answered_at = 0.0
        """time.monotonic"""

    def __call__(
        self, _dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]
    ) -> Connection:
        began = time.monotonic()
        if began < self._again_at:
            raise psycopg.OperationalError("PostgreSQL did not answer just now")
        try:
            connection = Connection.connect(*arguments, **{**LIMITS, **parameters})
        except psycopg.errors.ConnectionTimeout:
            # Unless it has answered somebody since.
            if self._answered_at < began:
                self._again_at = time.monotonic() + AGAIN_SECONDS
            raise
        self._answered_at, self._again_at = time.monotonic(), 0.0
        return connection


def bound_waits(engine: Engine) -> None:
    """From now on the engine's new connections keep to these limits."""
    event.listen(engine, "do_connect", _Connecting())
