"""The native routes: shapes, lists, conflicts and conditions."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from domain.settings import Settings
from tests.integration.http.assertions import refused
from tests.integration.http.conftest import PARAMETERS, SKILL, WINDOW

DEMOS = "/v1/assistants/support/skills/route/demonstrations"


def line(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "response": f"ROUTE: {number}"}


def test_an_assistant_starts_at_the_bare_base_model(api: TestClient, assistant: dict[str, Any]) -> None:
    assert assistant["id"].startswith("asst_")
    assert assistant["object"] == "assistant"
    assert (assistant["parameter_count"], assistant["context_window"]) == (PARAMETERS, WINDOW)
    assert assistant["champion"] == "v0"
    assert assistant["aliases"] == {"champion": "v0"}
    assert isinstance(assistant["created_at"], int)
    assert assistant["created_at"] > 1_700_000_000
    for key in ("support", assistant["id"]):
        assert api.get(f"/v1/assistants/{key}").json() == assistant


def test_an_assistant_is_renamed_and_described(api: TestClient, assistant: dict[str, Any]) -> None:
    changed = api.patch("/v1/assistants/support", json={"name": "helpdesk", "description": "First line"})
    assert changed.status_code == 200
    assert changed.json() == {**assistant, "name": "helpdesk", "description": "First line"}
    assert api.get("/v1/assistants/helpdesk").json() == changed.json()
    assert api.get("/v1/assistants/helpdesk/skills/route").status_code == 200
    refused(api.get("/v1/assistants/support"), 404, param="assistant", code="not_found")
    assert [row["id"] for row in api.get("/v1/models").json()["data"]] == [
        "helpdesk",
        "helpdesk@champion",
        "helpdesk@v0",
    ]
    entries = [row for row in api.get("/v1/audit_logs").json()["data"] if row["action"] == "assistant.update"]
    assert [row["data"] for row in entries] == [{"name": "helpdesk", "description": "First line"}]

    other = {"name": "support", "base_model": assistant["base_model"]}
    assert api.post("/v1/assistants", json=other).status_code == 201
    taken = api.patch("/v1/assistants/support", json={"name": "helpdesk"})
    refused(taken, 409, param="name", code="already_exists")
    assert api.patch("/v1/assistants/support", json={"name": "support"}).status_code == 200
    refused(
        api.patch("/v1/assistants/support", json={"name": "A b"}), 422, param="name", code="invalid_input"
    )
    unknown = api.patch("/v1/assistants/support", json={"base_model": "other"})
    refused(unknown, 422, param="base_model", code="invalid_input")


def test_lists_are_walked_with_after_and_limit(api: TestClient, assistant: dict[str, Any]) -> None:
    for number in range(4):
        body = {"name": f"more-{number}", "base_model": assistant["base_model"]}
        assert api.post("/v1/assistants", json=body).status_code == 201
    first = api.get("/v1/assistants?limit=2").json()
    assert [one["name"] for one in first["data"]] == ["support", "more-0"]
    assert (first["object"], first["has_more"]) == ("list", True)
    assert (first["first_id"], first["last_id"]) == (first["data"][0]["id"], first["data"][1]["id"])
    last = api.get(f"/v1/assistants?limit=3&after={first['last_id']}").json()
    assert [one["name"] for one in last["data"]] == ["more-1", "more-2", "more-3"]
    assert last["has_more"] is False
    empty = api.get(f"/v1/assistants?after={last['last_id']}").json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.usefixtures("assistant")
def test_a_skill_is_read_and_changed(api: TestClient) -> None:
    body = {
        "name": "calls",
        "description": "as a call",
        "grader": {"type": "regex", "pattern": "ROUTE: (.*)"},
        "holdout_fraction": 0.5,
    }
    created = api.post("/v1/assistants/support/skills", json=body)
    assert created.status_code == 201
    skill = created.json()
    assert skill["id"].startswith("skill_")
    assert {name: skill[name] for name in body} == body
    assert skill["demonstrations"] == {"train": 0, "holdout": 0}
    changed = api.patch(
        "/v1/assistants/support/skills/calls", json={"grader": {"type": "choice", "choices": "ABC"}}
    )
    assert changed.status_code == 200
    assert changed.json() == {**skill, "grader": {"type": "choice", "choices": "ABC"}}
    assert api.get("/v1/assistants/support/skills/calls").json() == changed.json()
    wrong = api.patch("/v1/assistants/support/skills/calls", json={"grade": {}})
    refused(wrong, 422, param="grade", code="invalid_input")
    bad = api.patch("/v1/assistants/support/skills/calls", json={"grader": {"type": "regex", "pattern": "("}})
    assert bad.json()["error"]["param"] == "grader.regex.pattern"


@pytest.mark.usefixtures("assistant")
def test_a_batch_counts_what_was_new(api: TestClient) -> None:
    lines = [line(1), line(2), line(1)]
    first = api.post(DEMOS, json={"demonstrations": lines})
    assert first.status_code == 201
    assert {
        name: first.json()[name] for name in ("accepted", "duplicates", "train", "holdout", "dry_run")
    } == {
        "accepted": 2,
        "duplicates": 1,
        "train": 2,
        "holdout": 0,
        "dry_run": False,
    }
    content = "\n".join(json.dumps(one) for one in [line(2), line(3)])
    again = api.post(DEMOS, content=content, headers={"content-type": "application/jsonl; charset=utf-8"})
    assert (again.json()["accepted"], again.json()["duplicates"]) == (1, 1)
    rows = api.get(DEMOS).json()["data"]
    assert [row["messages"][-1]["content"] for row in rows] == ["question 1", "question 2", "question 3"]
    assert rows[0]["answer"] == "ROUTE: 1"
    assert rows[2]["batch"] == again.json()["id"]
    assert api.get("/v1/assistants/support/skills/route").json()["demonstrations"] == {
        "train": 3,
        "holdout": 0,
    }
    assert api.get(f"{DEMOS}?split=holdout").json()["data"] == []


@pytest.mark.usefixtures("assistant")
def test_a_dry_run_counts_and_stores_nothing(api: TestClient) -> None:
    api.post(DEMOS, json={"demonstrations": [line(1)]})
    reply = api.post(f"{DEMOS}?dry_run=true", json={"demonstrations": [line(1), line(2), line(3)]})
    assert reply.status_code == 200
    body = reply.json()
    assert (body["id"], body["dry_run"], body["accepted"], body["duplicates"]) == (None, True, 2, 1)
    assert len(api.get(DEMOS).json()["data"]) == 1
    bad = api.post(f"{DEMOS}?dry_run=true", json={"demonstrations": [{"prompt": "x"}]})
    refused(bad, 422, param="line 1", code="invalid_demonstrations")


@pytest.mark.usefixtures("assistant")
def test_held_out_demonstrations_are_never_taught(api: TestClient) -> None:
    """The split follows from the prompt's hash: about half of 40 at 0.5, and the counts agree."""
    api.post("/v1/assistants/support/skills", json={**SKILL, "name": "half", "holdout_fraction": 0.5})
    path = "/v1/assistants/support/skills/half/demonstrations"
    counts = api.post(path, json={"demonstrations": [line(number) for number in range(40)]}).json()
    assert counts["train"] + counts["holdout"] == 40
    assert 8 <= counts["holdout"] <= 32
    held = api.get(f"{path}?split=holdout&limit=100").json()["data"]
    assert len(held) == counts["holdout"]
    assert {row["split"] for row in held} == {"holdout"}


@pytest.mark.usefixtures("assistant")
def test_an_update_is_accepted_with_the_default_recipe_overlaid(api: TestClient) -> None:
    api.post(DEMOS, json={"demonstrations": [line(1)]})
    reply = api.post(
        "/v1/assistants/support/updates", json={"recipe": {"lora_rank": 4, "seed": 7}, "publish": "hold"}
    )
    assert reply.status_code == 202
    update = reply.json()
    assert update["id"].startswith("upd_")
    assert (update["status"], update["phase"], update["version"], update["verdict"]) == (
        "queued",
        None,
        None,
        None,
    )
    assert update["skills"] == ["route"]
    assert update["publish"] == "hold"
    # Six parameters: the small model's recipe, but for the two fields given.
    assert (update["recipe"]["lora_rank"], update["recipe"]["seed"]) == (4, 7)
    assert (update["recipe"]["context"], update["recipe"]["method"]) == ("turns", "sdft")
    assert api.get(f"/v1/updates/{update['id']}").json() == update
    assert api.get("/v1/assistants/support/updates").json()["data"] == [update]


@pytest.mark.usefixtures("assistant")
def test_an_update_is_paused_resumed_and_cancelled(api: TestClient) -> None:
    api.post(DEMOS, json={"demonstrations": [line(1)]})
    update = api.post("/v1/assistants/support/updates", json={}).json()["id"]
    assert api.post(f"/v1/updates/{update}/pause").json()["status"] == "paused"
    refused(api.post(f"/v1/updates/{update}/pause"), 409, param="status", code="conflict")
    assert api.post(f"/v1/updates/{update}/resume").json()["status"] == "queued"
    cancelled = api.post(f"/v1/updates/{update}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] >= cancelled["created_at"]
    refused(api.post(f"/v1/updates/{update}/cancel"), 409, param="status", code="conflict")
    # What a cancelled update was to teach is new again.
    assert api.post("/v1/assistants/support/updates", json={}).status_code == 202


@pytest.mark.usefixtures("assistant")
def test_aliases_move_under_conditions(api: TestClient) -> None:
    canary = "/v1/assistants/support/aliases/canary"
    only_new = {"If-None-Match": "*"}
    created = api.put(canary, json={"version": "v0", "reason": "try"}, headers=only_new)
    assert created.status_code == 200, created.text
    assert created.headers["etag"] == '"1"'
    body = created.json()
    assert (body["alias"], body["from_version"], body["to_version"], body["revision"]) == (
        "canary",
        None,
        "v0",
        1,
    )
    refused(
        api.put(canary, json={"version": 0}, headers=only_new),
        412,
        param="If-Match",
        code="revision_mismatch",
    )
    for stale in ('"2"', 'W/"1"', "nonsense"):
        moved = api.put(canary, json={"version": "v0"}, headers={"If-Match": stale})
        refused(moved, 412, param="If-Match", code="revision_mismatch")
    got = api.get(canary)
    assert (got.headers["etag"], got.json()["version"], got.json()["revision"]) == ('"1"', "v0", 1)
    for fresh in ('"1"', "*"):
        assert api.put(canary, json={"version": "v0"}, headers={"If-Match": fresh}).json()["revision"] == 1
    absent = api.put(canary + "2", json={"version": "v0"}, headers={"If-Match": "*"})
    refused(absent, 412, param="If-Match", code="revision_mismatch")
    [move] = api.get(f"{canary}/history").json()["data"]
    assert (move["kind"], move["reason"], move["actor"], move["to_version"]) == (
        "promote",
        "try",
        "user",
        "v0",
    )
    names = [alias["alias"] for alias in api.get("/v1/assistants/support/aliases").json()["data"]]
    assert names == ["champion", "canary"]


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize(
    ("alias", "body", "status", "param"),
    [
        ("v1", {"version": "v0"}, 422, "alias"),
        ("Not%20ok", {"version": "v0"}, 422, "alias"),
        ("canary", {"version": "v1"}, 404, "version"),
        ("canary", {"version": -1}, 422, "version"),
        ("canary", {}, 422, "version"),
    ],
)
def test_a_wrong_alias_or_version_is_refused(
    api: TestClient, alias: str, body: dict[str, Any], status: int, param: str
) -> None:
    reply = api.put(f"/v1/assistants/support/aliases/{alias}", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"].startswith(param)
    assert len(api.get("/v1/assistants/support/aliases").json()["data"]) == 1


@pytest.mark.usefixtures("assistant")
def test_models_are_the_assistant_its_aliases_and_its_versions(api: TestClient) -> None:
    ids = [model["id"] for model in api.get("/v1/models").json()["data"]]
    assert ids == ["support", "support@champion", "support@v0"]
    for id in ids:
        model = api.get(f"/v1/models/{id}").json()
        assert (model["id"], model["object"], model["owned_by"]) == (id, "model", "team_default")
    for id in ("nobody", "support@v1", "support@canary", "support@", "Support"):
        refused(api.get(f"/v1/models/{id}"), 404, param="model", code="model_not_found")


def test_the_audit_log_tells_every_mutation(api: TestClient, assistant: dict[str, Any]) -> None:
    api.post(DEMOS, json={"demonstrations": [line(1)]})
    rows = api.get("/v1/audit_logs").json()["data"]
    actions = [row["action"] for row in rows]
    assert actions == ["assistant.create", "alias.move", "skill.create", "batch.accept"]
    assert rows[0]["object_id"] == assistant["id"]


def test_two_processes_serve_the_same_state(
    api: TestClient, assistant: dict[str, Any], settings: Settings
) -> None:
    with TestClient(create_app(settings), base_url="http://localhost:8000") as other:
        assert other.get("/v1/assistants/support").json() == assistant


def test_the_contract_is_published(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    for path, methods in {
        "/v1/assistants": {"get", "post"},
        "/v1/assistants/{assistant}": {"get", "patch"},
        "/v1/assistants/{assistant}/skills/{skill}": {"get", "patch"},
        "/v1/assistants/{assistant}/skills/{skill}/demonstrations": {"get", "post"},
        "/v1/assistants/{assistant}/updates": {"get", "post"},
        "/v1/updates/{update}/events": {"get"},
        "/v1/assistants/{assistant}/versions/{version}/compare": {"get"},
        "/v1/assistants/{assistant}/aliases/{alias}": {"get", "put"},
        "/v1/assistants/{assistant}/rollback": {"post"},
        "/v1/chat/completions": {"post"},
    }.items():
        assert paths[path].keys() == methods
    assert not any(path.startswith("/dashboard") for path in paths)
