"""Writers that race for one alias with If-Match: every acknowledged move is in the history, none twice."""

import random
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from tests.conftest_databases import NewDatabase
from tests.integration.http.publishing import publish

ALIAS = "/v1/assistants/support/aliases/canary"
WRITERS, ROUNDS, VERSIONS = 6, 8, 4


def test_no_move_is_lost_and_none_made_on_a_stale_view(
    settings: Settings, new_database: NewDatabase, base_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.rollback.SERVING_SECONDS", 0.0)
    chosen = settings.model_copy(update={"database_url": new_database(True)})
    with TestClient(create_app(chosen), base_url="http://127.0.0.1") as api:
        api.post("/v1/assistants", json={"name": "support", "base_model": str(base_folder)})
        context: Context = api.app.state.context  # type: ignore[attr-defined]
        for _ in range(VERSIONS - 1):
            publish(context, "support", outcome="hold")
        assert api.put(ALIAS, json={"version": "v0"}).status_code == 200
        made: list[tuple[int, str, str]] = []  # (revision, from, to) of each acknowledged move
        refused: list[int] = []

        def write(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(ROUNDS):
                seen = api.get(ALIAS)
                others = [f"v{n}" for n in range(VERSIONS) if f"v{n}" != seen.json()["version"]]
                wanted = choose.choice(others)
                put = api.put(ALIAS, json={"version": wanted}, headers={"If-Match": seen.headers["etag"]})
                if put.status_code == 200:
                    assert put.json()["revision"] == seen.json()["revision"] + 1
                    made.append((put.json()["revision"], seen.json()["version"], wanted))
                else:
                    refused.append(put.status_code)

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(made) + len(refused) == WRITERS * ROUNDS, "a writer failed"
        assert set(refused) == {412}, "nobody raced"
        history = api.get(f"{ALIAS}/history?limit=100").json()["data"]
        assert [(row["revision"], row["from_version"], row["to_version"]) for row in history[:-1]] == sorted(
            made, reverse=True
        )
        assert history[-1]["revision"] == 1
        assert api.get(ALIAS).json()["version"] == max(made)[2]
