"""A PostgreSQL server behind a path that can swallow what is sent, as a network does that drops packets."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from registry import postgresql

JOIN_SECONDS = 60
SILENCE, CONNECT = 0.5, 2
"""Seconds of patience while nothing passes; psycopg takes no shorter time to connect."""
BOUND = SILENCE + 2 * CONNECT + 30
"""Seconds: of silence of one connection, of another, of the one that should replace it, and for as long as a
busy machine stands still. Without limits of their own these waits have no end."""


class SwallowingProxy:
    """Forwards loopback TCP to the server's socket. While it swallows, nothing is forwarded, closed or
    refused; what was sent meanwhile arrives afterwards, as what TCP sends again does."""

    def __init__(self, server: Path) -> None:
        self._server = server
        self._passes = threading.Event()
        self._passes.set()
        self._ended = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def swallow(self) -> None:
        self._passes.clear()

    def forward(self) -> None:
        self._passes.set()

    def close(self) -> None:
        self._ended = True
        self._passes.set()
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive()
        for one in (self._listener, *self._sockets):
            one.close()

    def _start(self, target, *arguments) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._passes.wait()
            if self._ended:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets.append(server)
            server.connect(str(self._server))
            self._start(self._pump, client, server)
            self._start(self._pump, server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                self._passes.wait()
                sink.sendall(content)
        self._passes.wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def impatient() -> Iterator[None]:
    """Engines give up a silent server soon: only while it is silent, since a busy one may be slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postgresql, "SILENCE_SECONDS", SILENCE)
        patch.setattr(postgresql, "CONNECT_SECONDS", CONNECT)
        patch.setitem(postgresql.LIMITS, "connect_timeout", CONNECT)
        yield


@contextmanager
def swallowing(proxy: SwallowingProxy) -> Iterator[None]:
    """Nothing passes inside the block, and engines are impatient."""
    with impatient():
        proxy.swallow()
        try:
            yield
        finally:
            proxy.forward()


@contextmanager
def proxied(url: str) -> Iterator[tuple[str, SwallowingProxy]]:
    """The same database by way of a proxy of the block's own."""
    given = make_url(url)
    folder = given.query["host"]
    assert isinstance(folder, str)
    proxy = SwallowingProxy(Path(folder) / ".s.PGSQL.5432")
    try:
        shown = given.set(host="127.0.0.1", port=proxy.port, query={})
        yield shown.render_as_string(hide_password=False), proxy
    finally:
        proxy.close()
