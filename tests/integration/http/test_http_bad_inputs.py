"""Every bad input that a user can send gets a clear 4xx, and nothing is stored."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.integration.http.assertions import refused

DEMOS = "/v1/assistants/support/skills/route/demonstrations"
LINE = {"prompt": "where is my card", "response": "ROUTE: card"}
JSONL = {"content-type": "application/jsonl"}


def stored(api: TestClient) -> tuple[int, int]:
    """Demonstrations and updates of `support`, and nothing in the audit log beside them."""
    demonstrations = len(api.get(DEMOS).json()["data"])
    updates = len(api.get("/v1/assistants/support/updates").json()["data"])
    actions = [row["action"] for row in api.get("/v1/audit_logs?limit=100").json()["data"]]
    assert actions.count("update.create") == updates
    return demonstrations, updates


@pytest.mark.usefixtures("assistant")
def test_every_malformed_line_is_named_and_no_line_is_stored(api: TestClient) -> None:
    lines = [
        json.dumps(LINE),
        '{"prompt": "x", ',
        "",
        json.dumps({"prompt": "x"}),
        json.dumps({**LINE, "answr": "y"}),
    ]
    reply = api.post(DEMOS, content="\n".join(lines), headers=JSONL)
    error = refused(reply, 422, param="line 2", code="invalid_demonstrations")
    assert [line["line"] for line in error["lines"]] == [2, 4, 5]
    assert [line["param"] for line in error["lines"]] == [None, "response", "answr"]
    assert "line 2: not valid JSON" in error["message"]
    assert "line 4: response: Field required" in error["message"]
    assert stored(api) == (0, 0)


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"", "application/jsonl"),
        (b"\n \n", "application/x-ndjson"),
        (b'{"demonstrations": []}', "application/json"),
    ],
)
def test_an_empty_batch_is_refused(api: TestClient, content: bytes, media_type: str) -> None:
    reply = api.post(DEMOS, content=content, headers={"content-type": media_type})
    error = refused(reply, 422, param="line 1", code="invalid_demonstrations")
    assert "empty batch" in error["message"]
    assert stored(api) == (0, 0)


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize("media_type", ["application/jsonl", "application/json"])
def test_a_prompt_longer_than_the_window_is_refused_with_its_line(api: TestClient, media_type: str) -> None:
    fits = {"prompt": " ".join(["a"] * 62), "response": "b"}
    too_long = {"prompt": " ".join(["a"] * 63), "response": "b"}
    lines = [LINE, too_long, fits]
    content = "\n".join(json.dumps(line) for line in lines)
    if media_type == "application/json":
        content = json.dumps({"demonstrations": lines})
    reply = api.post(DEMOS, content=content, headers={"content-type": media_type})
    error = refused(reply, 422, param="line 2", code="invalid_demonstrations")
    assert len(error["lines"]) == 1
    assert "63 tokens" in error["message"]
    assert "64 tokens" in error["message"]
    assert stored(api) == (0, 0)
    fitting = api.post(DEMOS, content=json.dumps(fits), headers=JSONL)
    assert fitting.status_code == 201, fitting.text


@pytest.mark.usefixtures("assistant")
def test_an_unknown_grader_is_refused(api: TestClient) -> None:
    body = {"name": "other", "grader": {"type": "vibes"}}
    error = refused(
        api.post("/v1/assistants/support/skills", json=body), 422, param="grader", code="invalid_input"
    )
    assert "vibes" in error["message"]
    assert "function_call" in error["message"]
    assert [skill["name"] for skill in api.get("/v1/assistants/support/skills").json()["data"]] == ["route"]


@pytest.mark.parametrize("base_model", ["/nowhere/at/all", "no-such-built-in", "../etc", "a/b/c"])
def test_an_unknown_base_model_is_refused(api: TestClient, base_model: str) -> None:
    reply = api.post("/v1/assistants", json={"name": "support", "base_model": base_model})
    error = refused(reply, 422, param="base_model", code="unknown_base_model")
    assert base_model in error["message"]
    assert api.get("/v1/assistants").json()["data"] == []
    assert api.get("/v1/audit_logs").json()["data"] == []


def test_a_base_model_without_a_readable_tokenizer_is_refused(
    api: TestClient, base_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_text("{}")
    reply = api.post("/v1/assistants", json={"name": "support", "base_model": str(broken)})
    refused(reply, 422, param="base_model", code="unknown_base_model")
    assert api.get("/v1/assistants").json()["data"] == []


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize("skills", [None, ["route"]])
def test_an_update_without_new_demonstrations_is_refused(api: TestClient, skills: list[str] | None) -> None:
    body: dict[str, Any] = {} if skills is None else {"skills": skills}
    reply = api.post("/v1/assistants/support/updates", json=body)
    refused(reply, 409, param="skills", code="no_new_demonstrations")
    assert stored(api) == (0, 0)


@pytest.mark.usefixtures("assistant")
def test_demonstrations_that_wait_in_an_update_are_not_new(api: TestClient) -> None:
    api.post(DEMOS, json={"demonstrations": [LINE]})
    assert api.post("/v1/assistants/support/updates", json={}).status_code == 202
    reply = api.post("/v1/assistants/support/updates", json={})
    refused(reply, 409, param="skills", code="no_new_demonstrations")
    assert stored(api) == (1, 1)


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize("body", [None, {}, {"reason": "because"}])
def test_a_rollback_with_nothing_to_roll_back_to_is_refused(
    api: TestClient, body: dict[str, str] | None
) -> None:
    reply = api.post("/v1/assistants/support/rollback", json=body)
    refused(reply, 409, param=None, code="nothing_to_roll_back_to")
    history = api.get("/v1/assistants/support/aliases/champion/history").json()["data"]
    assert [move["kind"] for move in history] == ["create"]


@pytest.mark.usefixtures("assistant")
def test_a_rollback_to_the_champion_itself_is_refused(api: TestClient) -> None:
    reply = api.post("/v1/assistants/support/rollback", json={"to": "v0"})
    refused(reply, 409, param="to", code="nothing_to_roll_back_to")


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"skills": ["nope"]}, "skills"),
        ({"skills": []}, "skills"),
        ({"recipe": {"learning_rate": -1}}, "recipe.learning_rate"),
        ({"recipe": {"learn_rate": 1e-3}}, "recipe.learn_rate"),
        ({"recipe": {"lora_rank": -1}}, "recipe.lora_rank"),
        ({"gate": {"min_gain": 7}}, "gate.min_gain"),
        ({"gate": {"mingain": 0.1}}, "gate.mingain"),
        ({"publish": "maybe"}, "publish"),
        ({"skill": "route"}, "skill"),
    ],
)
def test_a_wrong_field_of_an_update_is_named(api: TestClient, body: dict[str, Any], param: str) -> None:
    api.post(DEMOS, json={"demonstrations": [LINE]})
    reply = api.post("/v1/assistants/support/updates", json=body)
    assert reply.json()["error"]["param"] == param
    assert reply.status_code == (404 if body == {"skills": ["nope"]} else 422)
    assert stored(api) == (1, 0)


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize(
    ("content", "media_type", "status", "param", "code"),
    [
        (b"{}", "application/json", 422, "demonstrations", "invalid_input"),
        (b"[]", "application/json", 422, "demonstrations", "invalid_input"),
        (b'{"demonstrations": [], "skill": 1}', "application/json", 422, "skill", "invalid_input"),
        (b"not json", "application/json", 422, None, "invalid_json"),
        (b"[" * 200_000, "application/json", 422, None, "invalid_json"),
        (b"[" * 200_000, "application/jsonl", 422, "line 1", "invalid_demonstrations"),
        (b"\xff\xfe", "application/jsonl", 422, "line 1", "invalid_demonstrations"),
        (
            b'{"prompt": "\\ud800", "response": "x"}',
            "application/jsonl",
            422,
            "line 1",
            "invalid_demonstrations",
        ),
        (
            b'{"prompt": "p", "response": "x", "metadata": {"k": "\\ud800"}}',
            "application/jsonl",
            422,
            "line 1",
            "invalid_demonstrations",
        ),
        (b"prompt,response", "text/csv", 415, None, "unsupported_media_type"),
        (b"{}", "application/x-www-form-urlencoded", 415, None, "unsupported_media_type"),
    ],
)
def test_a_body_that_is_no_batch_is_refused(
    api: TestClient, content: bytes, media_type: str, status: int, param: str | None, code: str
) -> None:
    reply = api.post(DEMOS, content=content, headers={"content-type": media_type})
    refused(reply, status, param=param, code=code)
    assert stored(api) == (0, 0)


@pytest.mark.parametrize(
    ("name", "base_model", "param"),
    [("Has Spaces", "x", "name"), ("", "x", "name"), (7, "x", "name"), ("ok", None, "base_model")],
)
def test_a_wrong_field_of_an_assistant_is_named(
    api: TestClient, name: object, base_model: str | None, param: str
) -> None:
    body = {"name": name} | ({} if base_model is None else {"base_model": base_model})
    refused(api.post("/v1/assistants", json=body), 422, param=param, code="invalid_input")
    assert api.get("/v1/assistants").json()["data"] == []


def test_a_taken_name_is_a_conflict(api: TestClient, assistant: dict[str, Any]) -> None:
    body = {"name": "support", "base_model": assistant["base_model"]}
    refused(api.post("/v1/assistants", json=body), 409, param="name", code="already_exists")
    assert len(api.get("/v1/assistants").json()["data"]) == 1


@pytest.mark.usefixtures("assistant")
def test_what_does_not_exist_is_404(api: TestClient) -> None:
    for method, path, param in [
        ("GET", "/v1/assistants/nobody", "assistant"),
        ("POST", "/v1/assistants/nobody/rollback", "assistant"),
        ("GET", "/v1/assistants/support/skills/nothing", "skill"),
        ("GET", "/v1/assistants/support/versions/v7", "version"),
        ("GET", "/v1/assistants/support/versions/v0/compare?to=v9", "version"),
        ("GET", "/v1/assistants/support/aliases/canary", "alias"),
        ("GET", "/v1/assistants/support/aliases/canary/history", "alias"),
        ("GET", "/v1/assistants/support/evaluations/meas_1", "measurement"),
        ("GET", "/v1/updates/upd_1", "update"),
        ("POST", "/v1/updates/upd_1/cancel", "update"),
        ("GET", "/v1/updates/upd_1/events", "update"),
    ]:
        refused(api.request(method, path), 404, param=param, code="not_found")


@pytest.mark.usefixtures("assistant")
@pytest.mark.parametrize(
    "path",
    [
        "/v1/assistants",
        "/v1/assistants/support/skills",
        DEMOS,
        "/v1/audit_logs",
        "/v1/assistants/support/evaluations",
    ],
)
def test_a_wrong_page_is_refused(api: TestClient, path: str) -> None:
    for query, param in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("after=zz", "after"),
    ]:
        refused(api.get(f"{path}?{query}"), 422, param=param, code="invalid_input")
