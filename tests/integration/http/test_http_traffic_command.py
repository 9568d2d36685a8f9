"""`ratchet traffic` against the real API."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from domain.settings import Settings
from tests.integration.http.stack import Stack, running

TRAFFIC = "/v1/assistants/support/traffic"
Run = Callable[..., Result]


@pytest.fixture
def stack(settings: Settings, base_folder: Path) -> Iterator[Stack]:
    with running(settings, base_folder) as one:
        for alias in ("canary", "candidate"):
            one.client.put(f"/v1/assistants/support/aliases/{alias}", json={"version": "v0"})
        yield one


@pytest.fixture
def run(stack: Stack) -> Run:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["traffic", "support", *arguments], env={"RATCHET_URL": stack.url})

    return invoke


def sides(stack: Stack) -> dict[str, Any]:
    plan = stack.client.get(TRAFFIC).json()
    return {name: plan[name] for name in ("canary", "shadow")}


def test_each_side_is_set_alone_and_all_of_it_ends(stack: Stack, run: Run) -> None:
    assert run().output.split() == ["champion", "100%", "of", "users"]
    stack.client.put(TRAFFIC, json={"canary": {"percent": 1, "min_requests": 7}})
    assert run("--canary", "canary", "--percent", "5").exit_code == 0
    assert (sides(stack)["canary"]["percent"], sides(stack)["canary"]["min_requests"]) == (5, 7)
    shown = run("--shadow", "candidate", "--percent", "20").output
    assert sides(stack)["canary"]["percent"] == 5
    assert "champion 95% of users" in shown
    assert "canary   5% of users: canary, v0" in shown
    assert "shadow   of 20% of requests: candidate, v0" in shown
    ended = json.loads(run("--off", "--json").output)
    assert (ended["canary"], ended["shadow"], ended["revision"]) == (None, None, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--canary", "canary"], "--percent belongs to"),
        (["--percent", "5"], "--percent belongs to"),
        (["--off", "--shadow", "candidate", "--percent", "5"], "choose one of"),
        (["--canary", "canary", "--percent", "0"], "greater than 0"),
        (["--canary", "nobody", "--percent", "5"], "no alias 'nobody'"),
    ],
)
def test_what_makes_no_sense_is_refused(stack: Stack, run: Run, arguments: list[str], says: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert says in refused.output
    assert sides(stack) == {"canary": None, "shadow": None}
