"""The API's listening socket, which uvicorn inherits."""

import socket

from cli.up import bind


def test_connections_send_small_writes_at_once() -> None:
    """Without it a stream's first token waits for the client's delayed acknowledgement of the headers."""
    with bind(0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            assert client.fileno() >= 0
