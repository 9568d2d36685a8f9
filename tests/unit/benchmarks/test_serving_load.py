"""The serving benchmark's own arithmetic: which replies mix versions, and which requests count as failed."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.serving_parts import _counts, _mixes, _quantiles
from benchmarks.serving_streams import Reply, Streams, stream_for
from benchmarks.serving_versions import says


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("amber amber amber", True),
        (" Amber amber am", True),
        ("amber", True),
        ("a", True),
        ("amber cobalt", False),
        ("cobalt amber", False),
        ("amber ambers", False),
        ("", False),
        ("am amber", False),
    ],
)
def test_a_word_again_and_again_and_nothing_else(text: str, said: bool) -> None:
    assert says("amber", text) is said


def reply(version: str | None, text: str, problem: str | None = None) -> Reply:
    return Reply(0.0, 1.0, 2.0, version, text, 3, problem, True)


def test_a_reply_mixes_when_its_words_are_not_its_versions() -> None:
    words = {"v1": "amber", "v2": "cobalt"}
    assert not _mixes(reply("v1", "amber amber"), words)
    assert _mixes(reply("v2", "amber amber"), words)
    assert _mixes(reply(None, "amber"), words)
    assert _mixes(reply("v3", "amber"), words)


def test_failures_are_counted_by_kind() -> None:
    found = _counts([reply("v1", "a"), reply("v1", "", "hangs"), reply("v1", "", "HTTP 503")] * 2)
    assert found == {"requests": 6, "failed": 4, "problems": {"hangs": 2, "HTTP 503": 2}}


def test_quantiles_of_a_hundred() -> None:
    assert _quantiles([n / 10 for n in range(100)]) == {"p50": 5.0, "p99": 9.9, "max": 9.9}
    assert _quantiles([]) is None


class Server(BaseHTTPRequestHandler):
    """Streams two words to `good`, breaks off for `torn`, refuses `full`, sends an error event to `sick`."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model = body["model"]
        if model == "full":
            content = json.dumps({"error": {"message": "no", "code": "overloaded"}}).encode()
            self.send_response(429)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_response(200)
        self.send_header("x-model-version", "v7")
        self.end_headers()  # HTTP/1.0: the end of the connection is the end of the body
        for word in ("amber", " amber"):
            event = {"choices": [{"delta": {"content": word}}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if model == "sick":
            self.wfile.write(b'data: {"error": {"code": "engine_unavailable"}}\n\n')
        if model != "torn":
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("model", "problem", "clean"),
    [
        ("good", None, True),
        ("torn", "the stream ended early", False),
        ("full", "HTTP 429", True),
        ("sick", "error event: engine_unavailable", True),
    ],
)
def test_what_a_client_saw(url: str, model: str, problem: str | None, clean: bool) -> None:
    replies, seconds = stream_for(url, [model], clients=2, seconds=0.2, max_tokens=4)
    assert len(replies) >= 2
    assert seconds >= 0.2
    for one in replies:
        assert (one.problem, one.clean) == (problem, clean)
        assert one.text == ("" if model == "full" else "amber amber")
        assert one.version == (None if model == "full" else "v7")
        assert (one.first_token_at is None) == (model == "full")


def test_waiting_for_a_reply_that_begins_later(url: str) -> None:
    with Streams(url, ["good", "full"], clients=1) as streams:
        found = streams.await_reply(lambda one: one.problem is not None, 60)
        assert found is not None
        assert found.problem == "HTTP 429"
        assert streams.await_reply(lambda one: one.version == "v8", 0.1) is None
