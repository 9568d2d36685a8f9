"""Acknowledged batches while the API is killed under the clients' hands, and PostgreSQL crashes."""

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import func, select
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from registry.tables import Batch, DemonstrationRow, IdempotencyKey
from tests.conftest_databases import NewDatabase
from tests.faults.postgres import crash, server_of
from tests.faults.world import LONG, World, kill, running_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

BATCHES = int(os.environ.get("FAULTS_BATCHES", "10000" if LONG else "50"))
LINES = 3
"""Demonstrations per batch, each with a prompt of its own."""
CLIENTS = 6
PATIENCE_SECONDS = 300.0
"""Of a client whose API is killed again and again, on a machine that takes long to start it."""
APIS = 2
SEED = int(os.environ.get("FAULTS_SEED", "1"))
DATABASES = ["sqlite", "postgresql"]


class Api:
    """One API process after another on one port."""

    def __init__(self, world: World) -> None:
        self._world = world
        # Bound and never listening: while the API is dead nobody else gets its port.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = self._reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: psutil.Process
        self.start()

    def start(self, failpoint: str = "") -> None:
        self.process = self._world.fork("api", port=self.port, failpoint=failpoint)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def restart(self, failpoint: str = "") -> None:
        kill(self.process)
        self.start(failpoint)
        self._world.stack.until(self.ready, "the API")

    def stop(self) -> None:
        kill(self.process)
        self._reserved.close()


@pytest.fixture(scope="module", params=DATABASES)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    with running_world(new(True)) as made:
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(made.stack.base / "tokenizer.json"))
        made.stack.stop_serving()  # the API's own controller does it here
        yield made


def new_skill(world: World, api: Api) -> str:
    """The URL of its demonstrations."""
    name = world.name("helper")
    with httpx.Client(base_url=api.url, timeout=20, trust_env=False) as http:
        body = {"name": name, "base_model": str(world.stack.base)}
        assert http.post("/v1/assistants", json=body).status_code == 201
        skill = {"name": "route", "grader": {"type": "exact"}, "holdout_fraction": 0.2}
        assert http.post(f"/v1/assistants/{name}/skills", json=skill).status_code == 201
    return f"/v1/assistants/{name}/skills/route/demonstrations"


def send(http: httpx.Client, url: str, key: str, prompts: list[str]) -> dict[str, Any]:
    """As a careful client does: the same key again until it is acknowledged."""
    body = {"demonstrations": [{"prompt": prompt, "response": "r"} for prompt in prompts]}
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        try:
            reply = http.post(url, json=body, headers={"Idempotency-Key": key})
        except httpx.HTTPError:
            time.sleep(0.05)
            continue
        if reply.status_code == 201:
            acknowledged: dict[str, Any] = reply.json()
            return acknowledged
        assert reply.status_code >= 500 or reply.status_code == 409, reply.text
        time.sleep(0.05)
    raise AssertionError(f"{key} was never acknowledged")


def assert_stored_once(world: World, acknowledged: list[dict[str, Any]], skill_url: str) -> None:
    assistant = skill_url.split("/")[3]
    assert {reply["accepted"] for reply in acknowledged} == {LINES}
    ids = [reply["id"] for reply in acknowledged]
    assert len(set(ids)) == len(ids)
    with world.stack.sessions.begin() as session:
        stored = dict(
            session.execute(
                select(DemonstrationRow.batch_id, func.count()).group_by(DemonstrationRow.batch_id)
            ).all()
        )
        assert {batch: stored.get(batch) for batch in ids} == dict.fromkeys(ids, LINES), assistant
        skill_ids = select(Batch.skill_id).where(Batch.id == ids[0])
        everything = session.scalars(select(Batch.id).where(Batch.skill_id.in_(skill_ids))).all()
        assert sorted(everything) == sorted(ids)
        unfinished = select(IdempotencyKey.key).where(IdempotencyKey.status_code.is_(None))
        assert session.scalars(unfinished).all() == []


@pytest.mark.parametrize("point", ["api.committing", "api.committed"])
def test_killed_around_its_commit(world: World, point: str) -> None:
    api = Api(world)
    world.stack.until(api.ready, "the API")
    url = new_skill(world, api)
    marker = world.stack.home / world.name("marker")
    api.restart(f"{point} kill {marker}")
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=api.url, timeout=20, trust_env=False) as http:
        sent = pool.submit(send, http, url, world.name("key"), [f"{point} {n}" for n in range(LINES)])
        world.stack.until(marker.exists, "the API's death")
        api.restart()
        reply = sent.result(PATIENCE_SECONDS)
    assert_stored_once(world, [reply], url)
    api.stop()


def test_acknowledged_batches_are_stored_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    apis = [Api(world) for _ in range(APIS)]
    for api in apis:
        world.stack.until(api.ready, "the API")
    url = new_skill(world, apis[0])
    draw, server = random.Random(SEED), server_of(world.stack.db)
    kills = {"api": 0, "database": 0}
    done = threading.Event()

    def hunt() -> None:
        while True:
            draw.choice(apis).restart()
            kills["api"] += 1
            if server is not None and kills["api"] % 5 == 0:
                crash(server, draw)
                kills["database"] += 1
            if done.wait(draw.uniform(0.0, 0.3)):
                return

    def post(n: int) -> dict[str, Any]:
        with httpx.Client(base_url=apis[n % APIS].url, timeout=20, trust_env=False) as http:
            return send(http, url, f"{url} {n}", [f"{n} {line}" for line in range(LINES)])

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        hunter = pool.submit(hunt)
        try:
            acknowledged = list(pool.map(post, range(BATCHES)))
        finally:
            done.set()
        hunter.result(PATIENCE_SECONDS)
        for api in apis:
            world.stack.until(api.ready, "the API")
        again = [post(n) for n in range(0, BATCHES, 10)]
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(f"\n{world.stack.db.dialect.name}: {BATCHES} batches in {seconds:.0f} s, kills {kills}")
    assert again == acknowledged[::10]
    assert_stored_once(world, acknowledged, url)
    assert kills["api"] >= 1
    for api in apis:
        api.stop()
