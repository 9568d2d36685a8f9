"""Templates and the shapes they are given agree; static files hold what the pages rely on."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from api.dashboard.rendering import STATIC, TEMPLATES

FOLDER = Path(__file__).resolve().parents[3] / "api" / "templates"


def _source(template: str) -> str:
    """A template with what it extends and includes."""
    text = (FOLDER / template).read_text()
    parts = re.findall(r'\{% (?:extends|include) "([^"]+)"', text)
    return text + "".join(_source(part) for part in parts)


@pytest.mark.parametrize("shape", TEMPLATES, ids=lambda shape: shape.__name__)
def test_a_page_uses_every_field_of_its_shape_and_no_other(shape: type) -> None:
    used = set(re.findall(r"\bpage\.(\w+)", _source(TEMPLATES[shape])))

    assert used == {field.name for field in fields(shape)}


@pytest.mark.parametrize("template", sorted(FOLDER.rglob("*.html")), ids=lambda path: path.name)
def test_nothing_is_inline_that_the_content_policy_forbids_or_loaded_from_elsewhere(template: Path) -> None:
    text = template.read_text()

    assert re.findall(r"\sstyle=|<style|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)", text) == []
    assert re.findall(r'(?:src|href|action)="(?:https?:)?//', text) == []
    assert "|safe" not in text.replace(" ", "")


def test_vendored_htmx_comes_with_its_licence() -> None:
    licence = (FOLDER.parent / "static" / "htmx.LICENSE.txt").read_text()

    assert licence.startswith("Zero-Clause BSD")
    assert STATIC["htmx.min.js"].body.startswith(b"var htmx=")


def test_every_heat_step_has_its_colour() -> None:
    css = STATIC["dashboard.css"].body.decode()

    assert [step for step in range(21) if f".heat-{step} {{ --heat: {step * 5}%; }}" not in css] == []
