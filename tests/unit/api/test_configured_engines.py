"""Running servers that the settings name, against real HTTP servers and a real ledger."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from api import configured_engines
from api.configured_engines import ConfiguredEngines, served_name
from registry import serving
from registry.session import make_engine, make_sessions
from tests.conftest_databases import NewDatabase

BASE = {"id": "served", "parent": None, "root": "/models/base/org--model"}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is held up, as all of this process may be, is not one that does not answer."""
    monkeypatch.setattr(configured_engines, "ANSWER_SECONDS", 60.0)


@pytest.mark.parametrize(
    ("card", "base_model", "name"),
    [
        ({"id": "org/model", "parent": None, "root": "/x"}, "org/model", "org/model"),
        ({"id": "org/model", "parent": "bare:org/model", "root": "/zeros"}, "org/model", "org/model"),
        (BASE, "org/model", "served"),
        ({**BASE, "root": "org/model"}, "org/model", "served"),
        ({**BASE, "root": "/data/tiny"}, "/data/tiny", "served"),
        ({**BASE, "root": "/data/tiny"}, "/other/tiny", None),
        ({**BASE, "parent": "other"}, "org/model", None),
        ({**BASE, "root": None}, "org/model", None),
        (BASE, "org/other", None),
    ],
)
def test_a_base_is_known_by_name_or_by_where_it_was_loaded_from(
    card: dict[str, Any], base_model: str, name: str | None
) -> None:
    assert served_name([{"id": "else", "parent": None, "root": "/else"}, card], base_model) == name


@contextmanager
def server(cards: list[dict[str, Any]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": cards}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


def test_each_url_becomes_a_replica_once_it_answers(
    new_sqlite: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = make_sessions(make_engine(new_sqlite(True)))
    clock = [100.0]
    monkeypatch.setattr(configured_engines.time, "monotonic", lambda: clock[0])

    def known() -> dict[str, tuple[str, str]]:
        with sessions.begin() as session:
            return {one.url: (one.base_model, one.model_name) for one in serving.replicas(session)}

    def register(engines: ConfiguredEngines) -> bool:
        with sessions.begin() as session:
            replicas = serving.replicas(session)
        return engines.register(replicas, ["org/model"], [])

    with server([BASE]) as first, server([{**BASE, "id": "org/model"}]) as second, server([]) as third:
        engines = ConfiguredEngines([first, "http://127.0.0.1:9", second, third], sessions)
        assert not engines.register([], [], [])  # no assistant yet: nobody is asked
        assert register(engines)
        assert known() == {first: ("org/model", "served"), second: ("org/model", "org/model")}
        assert not register(engines)
        clock[0] += configured_engines.AGAIN_SECONDS
        assert not register(engines)


def test_a_server_that_did_not_answer_is_asked_again_after_a_while(
    new_sqlite: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = make_sessions(make_engine(new_sqlite(True)))
    clock = [100.0]
    monkeypatch.setattr(configured_engines.time, "monotonic", lambda: clock[0])
    cards: list[dict[str, Any]] = []
    with server(cards) as url:
        engines = ConfiguredEngines([url], sessions)
        assert not engines.register([], ["org/model"], [])
        cards.append(BASE)
        assert not engines.register([], ["org/model"], [])
        clock[0] += configured_engines.AGAIN_SECONDS
        assert engines.register([], ["org/model"], [])


def test_a_url_that_serves_another_model_is_registered_anew_or_not_at_all(
    new_sqlite: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = make_sessions(make_engine(new_sqlite(True)))
    clock = [100.0]
    monkeypatch.setattr(configured_engines.time, "monotonic", lambda: clock[0])
    used = ["org/model", "org/other"]
    cards = [BASE]

    def look(engines: ConfiguredEngines, *mistaken: str) -> tuple[bool, list[tuple[str, str]]]:
        clock[0] += configured_engines.AGAIN_SECONDS
        with sessions.begin() as session:
            known = serving.replicas(session)
        changed = engines.register(known, used, mistaken)
        with sessions.begin() as session:
            return changed, [(one.base_model, one.model_name) for one in serving.replicas(session)]

    with server(cards) as url:
        engines = ConfiguredEngines([url], sessions)
        assert look(engines) == (True, [("org/model", "served")])
        cards[:] = [
            {"id": "org/other", "parent": None, "root": "/models/base/org--other"},
            {"id": "org/other-v1", "parent": "org/other", "root": "/x"},
        ]
        assert look(engines) == (False, [("org/model", "served")])  # nobody says so yet
        assert look(engines, url) == (True, [("org/other", "org/other")])
        assert look(engines, url) == (False, [("org/other", "org/other")])
        cards[:] = [{"id": "org/third", "parent": None, "root": "/x"}]
        assert look(engines, url) == (True, [])
        assert look(engines) == (False, [])
        cards[:] = [BASE]
        assert look(engines) == (True, [("org/model", "served")])
        # While no process looked, another server took the url.
        cards[:] = [{"id": "org/other", "parent": None, "root": None}]
        assert look(ConfiguredEngines([url], sessions)) == (True, [("org/other", "org/other")])
        # One that does not answer is not forgotten.
        cards.clear()
        assert look(engines, url) == (False, [("org/other", "org/other")])


def test_servers_of_an_earlier_list_are_forgotten_at_the_start_only(new_sqlite: NewDatabase) -> None:
    sessions = make_sessions(make_engine(new_sqlite(True)))

    def add(*urls: str) -> None:
        with sessions.begin() as session:
            for url in urls:
                serving.register_replica(session, url, "org/model", "served")

    def look(engines: ConfiguredEngines) -> tuple[bool, list[str]]:
        with sessions.begin() as session:
            known = serving.replicas(session)
        changed = engines.register(known, ["org/model"], [])
        with sessions.begin() as session:
            return changed, sorted(replica.url for replica in serving.replicas(session))

    add("http://127.0.0.1:1", "http://127.0.0.1:2")
    engines = ConfiguredEngines(["http://127.0.0.1:2"], sessions)
    assert look(engines) == (True, ["http://127.0.0.1:2"])
    add("http://127.0.0.1:3")  # by a process with another list
    assert look(engines) == (False, ["http://127.0.0.1:2", "http://127.0.0.1:3"])
    # Without a list, engines are registered by `ratchet up`.
    assert look(ConfiguredEngines([], sessions)) == (False, ["http://127.0.0.1:2", "http://127.0.0.1:3"])
