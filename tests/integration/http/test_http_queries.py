"""No request asks the database once per row: as many statements for many rows as for a few."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event

from api.context import Context
from domain.measurement import Measurement
from tests.integration.http.conftest import SKILL
from tests.integration.http.publishing import publish

DEMOS = "/v1/assistants/support/skills/route/demonstrations"
READS = (
    "/v1/assistants",
    "/v1/assistants/support",
    "/v1/assistants/support/skills",
    "/v1/assistants/support/skills/route",
    DEMOS,
    "/v1/assistants/support/updates",
    "/v1/assistants/support/versions",
    "/v1/assistants/support/versions/v1",
    "/v1/assistants/support/aliases",
    "/v1/assistants/support/aliases/champion",
    "/v1/assistants/support/aliases/champion/history",
    "/v1/assistants/support/evaluations",
    "/v1/assistants/support/matrix",
    "/v1/assistants/support/forgetting",
    "/v1/models",
    "/v1/audit_logs",
    "/dashboard",
    "/dashboard/assistants/support",
)
MOST = 12
"""Statements of one read; the dashboard's page of an assistant is the exception."""
MOST_OF_THE_PAGE = 30


@contextmanager
def counted(context: Context) -> Iterator[list[str]]:
    """The statements that reach the database within the block, but for those that begin a transaction."""
    engine: Engine = context.sessions.kw["bind"]
    statements: list[str] = []

    def keep(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        # The sender of webhooks looks for work whenever it likes.
        if not statement.startswith(("BEGIN", "PRAGMA")) and "webhook_deliveries" not in statement:
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", keep)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", keep)


@pytest.fixture
def quiet(api: TestClient, assistant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Context:
    """A ledger that neither the controller nor the keeper of traffic plans reads while statements are
    counted."""
    context: Context = api.app.state.context  # type: ignore[attr-defined]
    context.controller.__exit__(None, None, None)
    monkeypatch.setattr(context.keeper, "refresh", lambda: None)
    with context.keeper._reading:  # one that had begun has ended
        pass
    return context


def grow(api: TestClient, context: Context, base_model: str, start: int, stop: int) -> None:
    """More of everything that the lists show: versions with measurements, skills, aliases, assistants."""
    for number in range(start, stop):
        measured = Measurement(kind="skill", suite=f"s{number}", score=1.0, n=4, low=0.5, high=1.0, items=[])
        made = publish(context, "support", skill=f"taught-{number}", measurements=[measured])
        put = api.put(f"/v1/assistants/support/aliases/a{number}", json={"version": f"v{made}"})
        assert put.status_code == 200
        assert api.post("/v1/assistants/support/skills", json={**SKILL, "name": f"s{number}"}).is_success
        other = {"name": f"other-{number}", "base_model": base_model}
        assert api.post("/v1/assistants", json=other).status_code == 201
        line = {"prompt": f"case {number}", "response": "r"}
        assert api.post(DEMOS, json={"demonstrations": [line]}).is_success


def test_reads_take_as_many_statements_for_many_rows_as_for_few(
    api: TestClient, assistant: dict[str, Any], quiet: Context
) -> None:
    def measure() -> dict[str, int]:
        found = {}
        for path in READS:
            with counted(quiet) as statements:
                assert api.get(path).status_code == 200, path
            found[path] = len(statements)
        return found

    grow(api, quiet, assistant["base_model"], 0, 2)
    few = measure()
    grow(api, quiet, assistant["base_model"], 2, 7)
    many = measure()
    assert all(few.values()), "a read without a statement: the counter misses it"
    # A card of the dashboard shows one running or recent update each, eight at most.
    page = "/dashboard/assistants/support"
    assert many.pop(page) <= MOST_OF_THE_PAGE
    few.pop(page)
    assert many == few
    assert max(many.values()) <= MOST


def test_a_batch_takes_as_many_statements_whatever_its_size(api: TestClient, quiet: Context) -> None:
    taken = []
    for start, stop in ((0, 2), (2, 102)):
        lines = [{"prompt": f"q {number}", "response": "r"} for number in range(start, stop)]
        with counted(quiet) as statements:
            assert api.post(DEMOS, json={"demonstrations": lines}).json()["accepted"] == stop - start
        taken.append(len(statements))
    assert taken[0] == taken[1] <= 14
