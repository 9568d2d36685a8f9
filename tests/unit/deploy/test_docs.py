"""The user's pages name what the product has: routes, settings, recipe fields, rules, files they link to."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from typer.main import get_command

from api.app import create_app
from cli.main import app as ratchet
from domain.measurement import GateRules
from domain.recipe import Recipe
from domain.settings import Settings
from domain.update import Phase, Status

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = tuple(sorted(path.name for path in DOCS.glob("*.md")))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return create_app(Settings(home=tmp_path_factory.mktemp("home")))


def routes(app: FastAPI) -> set[str]:
    paths = app.openapi()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def test_the_reference_lists_every_route_and_no_other(app: FastAPI) -> None:
    listed = set(
        re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) \S+)` \|", (DOCS / "http.md").read_text(), re.M)
    )

    assert listed - {"GET /dashboard"} == routes(app)


@pytest.mark.parametrize("page", PAGES)
def test_every_curl_calls_a_route(app: FastAPI, page: str) -> None:
    text = (DOCS / page).read_text().replace("\\\n", " ")
    patterns = [
        (method, re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path))))
        for method, path in (route.split(" ", 1) for route in routes(app))
    ]
    calls = [line for line in text.splitlines() if line.startswith("curl ")]
    for call in calls:
        address = re.search(r"\$RATCHET_URL(/\S+)", call)
        assert address is not None, call
        explicit = re.search(r"-X (\w+)", call)
        sends = " -d " in call or "--data-binary" in call
        method = explicit.group(1) if explicit else "POST" if sends else "GET"
        path = address.group(1).split("?")[0]
        assert any(method == known and pattern.fullmatch(path) for known, pattern in patterns), call

    assert calls or page not in ("quickstart.md", "http.md")


def test_every_setting_is_described() -> None:
    described = set(re.findall(r"^\| `(RATCHET_\w+)` \|", (DOCS / "operations.md").read_text(), re.M))

    assert described == {f"RATCHET_{name.upper()}" for name in Settings.model_fields}


def test_states_phases_and_rules_are_the_products_own() -> None:
    concepts = (DOCS / "concepts.md").read_text()

    assert [phase for phase in re.findall(r"^\| (\w+) \| ", concepts, re.M) if phase in set(Phase)] == list(
        Phase
    )
    assert all(f"`{status.value}`" in concepts for status in Status)
    rules = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", concepts, re.M))
    assert {name: float(value) for name, value in rules.items()} == GateRules().model_dump()


def test_recipe_fields_in_the_pages_exist() -> None:
    concepts = (DOCS / "concepts.md").read_text()
    named = re.search(r"\*\*Recipe\.\*\* Every training knob \(([^)]*)\)", concepts)
    assert named is not None

    assert set(re.findall(r"`(\w+)`", named.group(1))) <= set(Recipe.model_fields)


def test_every_recipe_field_is_described_with_its_two_defaults() -> None:
    page = (DOCS / "recipes.md").read_text()
    described = {
        name: tuple(defaults)
        for name, *defaults in re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.M)
    }
    recipes = Recipe.paper().model_dump(), Recipe.small_model().model_dump()

    assert list(described) == list(Recipe.model_fields)
    for name, told in described.items():
        for value, text in zip((recipe[name] for recipe in recipes), told, strict=True):
            assert (text if isinstance(value, str) else json.loads(text)) == value, name


def test_the_command_line_s_page_lists_every_command_and_only_options_it_has() -> None:
    rows = re.findall(
        r"^\| `ratchet ([a-z]+(?: [a-z]+)?)[^`]*` \|([^|]*)\|", (DOCS / "cli.md").read_text(), re.M
    )
    options = dict(_commands(get_command(ratchet)))

    assert sorted(name for name, _ in rows) == sorted(options)
    assert [name for name, told in rows if not set(re.findall(r"--[a-z-]+", told)) <= options[name]] == []


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command below `command` by its words, with its options."""
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    for word, subcommand in subcommands.items():
        yield from _commands(subcommand, f"{name} {word}".strip())
    if not subcommands:
        yield name, {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (DOCS / page).read_text())

    assert [link for link in links if not (DOCS / link).exists()] == []
