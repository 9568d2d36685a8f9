"""The way to an S3 server, which a test can shut: requests are passed on, answered 503, or swallowed."""

import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import urlsplit

from tests.worker_stack.engine import QuietServer

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Gate:
    def __init__(self, upstream: str) -> None:
        self.mode: Literal["open", "failing", "silent"] = "open"
        """Read anew for every request."""
        self.refused = 0
        """Requests that were not passed on."""
        self._upstream = urlsplit(upstream).netloc
        self._server = QuietServer(self._handler())

    @property
    def url(self) -> str:
        return self._server.url

    def stop(self) -> None:
        self.mode = "failing"
        self._server.stop()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if gate.mode != "open":
                    gate.refused += 1
                    self._refuse()
                    return
                upstream = HTTPConnection(gate._upstream)
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                content = reply.read()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in HOP:
                        self.send_header(name, value)
                length = reply.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)
                upstream.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

            def _refuse(self) -> None:
                while gate.mode == "silent":
                    time.sleep(0.05)
                self.close_connection = True
                self.send_error(503)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
