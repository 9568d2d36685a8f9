"""Versions, their measurements, comparison, matrix and forgetting, over a story with known figures."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.context import Context
from domain.settings import Settings
from tests.conftest_databases import NewDatabase
from tests.integration.http.assertions import refused
from tests.seeded_story import SCORES, SKILLS, Files, tell

BOT = "/v1/assistants/support-bot"
SUITES = [("skill", suite) for suite in sorted(SKILLS)] + [
    ("general", suite) for suite in sorted(SCORES[2].keys() - set(SKILLS))
]
"""Of v2: skills before general benchmarks."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, new_sqlite: NewDatabase) -> Iterator[TestClient]:
    """v1 learned banking-intent, v2 ticket-json and serves, v3 was blocked; see tests.seeded_story."""
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, cache_dir=home / "cache", database_url=new_sqlite(True))
    app = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        context: Context = app.state.context
        tell(context.sessions, Files(settings.artifacts_dir, settings.work_dir))
        yield client


def test_the_matrix_shows_every_skill_of_every_version(story: TestClient) -> None:
    matrix = story.get(f"{BOT}/matrix").json()
    assert matrix["skills"] == ["banking-intent", "ticket-json"]
    versions = [
        (one["version"], one["parent"], one["taught"], one["outcome"], one["champion"])
        for one in matrix["versions"]
    ]
    assert versions == [
        ("v0", None, [], None, False),
        ("v1", "v0", ["banking-intent"], "pass", False),
        ("v2", "v1", ["ticket-json"], "pass", True),
        ("v3", "v2", ["banking-intent"], "block", False),
    ]
    banking = matrix["scores"]["banking-intent"]
    assert [banking[version]["score"] for version in ("v0", "v1", "v2", "v3")] == [0, 0.85, 0.8, 22 / 60]
    assert banking["v1"]["n"] == 60
    # Wilson's interval of 51/60.
    assert (round(banking["v1"]["low"], 4), round(banking["v1"]["high"], 4)) == (0.7389, 0.9190)
    # Unmeasured is null, never 0.
    assert matrix["scores"]["ticket-json"]["v3"] is None
    assert matrix["general"]["piqa"]["v3"] is None
    assert matrix["general"]["hellaswag"]["v3"]["score"] == 0.38


def test_forgetting_follows_the_champions_lineage(story: TestClient) -> None:
    found = story.get(f"{BOT}/forgetting").json()
    assert (found["version"], found["lineage"]) == ("v2", ["v0", "v1", "v2"])
    assert found["learned"] == {"banking-intent": "v1", "ticket-json": "v2"}
    expected = {
        "acc": (0.8 + 0.825) / 2,
        "bwt": 0.8 - 0.85,
        "fwt": 2 / 40 - 1 / 40,
        "forgetting_worst": 0.85 - 0.8,
        "gain_mean": (0.85 + 0.8) / 2,
        "general_drop_mean": 0.01,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    first = story.get(f"{BOT}/forgetting?version=v1").json()
    assert (first["acc"], first["bwt"], first["lineage"]) == (0.85, None, ["v0", "v1"])


def test_a_version_tells_all_about_itself(story: TestClient) -> None:
    version = story.get(f"{BOT}/versions/v2").json()
    assert version["id"].startswith("ver_")
    assert (version["version"], version["parent"], version["kind"]) == ("v2", "v1", "adapter")
    assert version["aliases"] == ["champion"]
    assert version["lineage"] == ["v0", "v1", "v2"]
    assert version["verdict"]["outcome"] == "pass"
    assert version["recipe"]["context"] == "turns"
    files = {file["path"] for file in version["manifest"]["files"]}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    suites = [(one["kind"], one["suite"]) for one in version["measurements"]]
    assert suites == SUITES
    assert story.get(f"{BOT}/versions/{version['id']}").json() == version
    blocked = story.get(f"{BOT}/versions/v3").json()
    assert blocked["verdict"]["outcome"] == "block"
    assert "fell by 43.3 points" in blocked["verdict"]["reasons"][0]
    page = story.get(f"{BOT}/versions?limit=3").json()
    assert [one["version"] for one in page["data"]] == ["v0", "v1", "v2"]
    assert page["has_more"] is True


def test_versions_compare_on_identical_items(story: TestClient) -> None:
    found = story.get(f"{BOT}/versions/v1/compare?to=v2").json()
    assert (found["from_version"], found["to_version"]) == ("v1", "v2")
    suites: dict[str, Any] = {one["suite"]: one for one in found["suites"]}
    assert list(suites) == [suite for _, suite in SUITES]
    banking = suites["banking-intent"]
    # 51 right before, 48 after, of the same 60: three lost, none gained; exact McNemar 2 * (1/2)^3.
    assert (banking["paired_items"], banking["lost"], banking["gained"]) == (60, 3, 0)
    assert banking["change"] == pytest.approx(-0.05)
    assert banking["low"] < -0.05 < banking["high"]
    assert banking["p_value"] == pytest.approx(0.25)
    assert [item["to_score"] for item in banking["changed"]] == [0, 0, 0]
    assert suites["ticket-json"]["gained"] == 31
    assert len(suites["ticket-json"]["changed"]) == 31
    gap = story.get(f"{BOT}/versions/v2/compare?to=v3").json()["suites"]
    tickets = next(one for one in gap if one["suite"] == "ticket-json")
    assert (tickets["to_score"], tickets["paired_items"], tickets["change"]) == (None, 0, None)
    refused(story.get(f"{BOT}/versions/v1/compare"), 422, param="to", code="invalid_input")


def test_measurements_are_listed_and_read_with_their_items(story: TestClient) -> None:
    everything: list[dict[str, Any]] = []
    after = ""
    while True:
        page = story.get(f"{BOT}/evaluations?limit=5{after}").json()
        everything += page["data"]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert [(one["version"], one["suite"]) for one in everything] == [
        (f"v{number}", suite)
        for number, measured in SCORES.items()
        for suite in sorted(measured, key=lambda suite: (suite not in SKILLS, suite))
    ]
    assert len({one["id"] for one in everything}) == len(everything)
    of_v3 = story.get(f"{BOT}/evaluations?version=v3").json()["data"]
    assert {one["suite"] for one in of_v3} == SCORES[3].keys()
    detail = story.get(f"{BOT}/evaluations/{of_v3[0]['id']}").json()
    assert {name: detail[name] for name in of_v3[0]} == of_v3[0]
    assert len(detail["items"]) == 60
    assert sum(item["score"] for item in detail["items"]) == 22


def test_a_running_update_names_its_parent(story: TestClient) -> None:
    *_, running = story.get(f"{BOT}/updates").json()["data"]
    assert (running["status"], running["phase"]) == ("running", "training")
    assert (running["parent_version"], running["version"]) == ("v2", None)
    cancelled = story.post(f"/v1/updates/{running['id']}/cancel").json()
    assert (cancelled["status"], cancelled["cancel_requested"]) == ("running", True)


def test_a_blocked_version_is_no_target_of_a_rollback(story: TestClient) -> None:
    blocked = story.post(f"{BOT}/rollback", json={"to": "v3"})
    refused(blocked, 409, param="version", code="version_blocked")
    unknown = story.post(f"{BOT}/rollback", json={"to": "v9"})
    refused(unknown, 404, param="version", code="not_found")
    assert story.get(BOT).json()["champion"] == "v2"
