"""The rollback form: what it shows, and from where it may be sent."""

import re

import pytest
from httpx import Response

from registry import aliases, assistants, versions
from registry.tables import Alias
from tests.seeded_story import ASSISTANT, TEAM
from tests.unit.dashboard.conftest import ADDRESS, Site

FORM = f"/dashboard/assistants/{ASSISTANT}/rollback"
OWN = {"origin": ADDRESS, "sec-fetch-site": "same-origin"}


def open_form(site: Site) -> dict[str, str]:
    """The form's fields as a browser would send them; the cookie is now in the client's jar."""
    html = site.client.get(FORM).text
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', html))
    chosen = re.search(r'<option value="(\d+)" selected', html)
    assert chosen is not None
    return {**fields, "to": chosen.group(1), "reason": "wrong refunds"}


def champion(site: Site) -> tuple[int, int]:
    """Version number and revision."""
    with site.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        alias: Alias = aliases.get_alias(session, assistant, "champion")
        return versions.get_version(session, assistant, alias.version_id).number, alias.revision


def send(site: Site, fields: dict[str, str], headers: dict[str, str]) -> Response:
    return site.client.post(FORM, data=fields, headers=headers)


def test_the_form_shows_from_and_to_before_anything_moves(site: Site) -> None:
    html = site.client.get(FORM).text

    assert '<div class="version" id="rollback-from">v2</div>' in html
    assert re.findall(r'<option value="(\d)"( selected)?>([^<]+)</option>', html) == [
        ("1", " selected", "v1"),
        ("0", "", "v0 (base model)"),
    ]
    assert champion(site) == (2, 3)


def test_the_form_moves_the_champion_with_its_reason(site: Site) -> None:
    reply = send(site, open_form(site), OWN)

    assert reply.status_code == 303
    assert reply.headers["location"] == f"/dashboard/assistants/{ASSISTANT}?moved=4"
    assert champion(site) == (1, 4)
    with site.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        move = aliases.history(session, assistant, "champion", None, 1).rows[0]
    assert (move.kind, move.actor, move.reason) == ("rollback", "dashboard", "wrong refunds")
    after = site.client.get(reply.headers["location"]).text
    assert "champion moved from v2 to v1." in after
    assert "by dashboard: wrong refunds" in re.sub(r"<[^>]+>", "", after)


def test_a_chosen_version_is_where_it_goes(site: Site) -> None:
    assert send(site, {**open_form(site), "to": "0"}, OWN).status_code == 303
    assert champion(site) == (0, 4)


def test_a_reason_is_shown_as_text(site: Site) -> None:
    send(site, {**open_form(site), "reason": "<img src=x onerror=alert(1)>"}, OWN)

    html = site.client.get(f"/dashboard/assistants/{ASSISTANT}").text
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "<img" not in html


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": ADDRESS},
        {"origin": "http://127.0.0.1:9999", "sec-fetch-site": "same-origin"},
    ],
)
def test_a_form_from_elsewhere_moves_nothing(site: Site, headers: dict[str, str]) -> None:
    reply = send(site, open_form(site), headers)

    assert reply.status_code == 403
    assert champion(site) == (2, 3)


def test_a_form_without_the_cookies_token_moves_nothing(site: Site) -> None:
    fields = open_form(site)
    wrong = send(site, {**fields, "token": "A" * 43}, OWN)
    odd = send(site, {**fields, "token": "€"}, OWN)
    site.client.cookies.clear()
    without_cookie = send(site, fields, OWN)
    empty = send(site, {**fields, "token": ""}, OWN)

    assert [reply.status_code for reply in (wrong, odd, without_cookie, empty)] == [403, 403, 403, 422]
    assert champion(site) == (2, 3)


def test_the_cookie_is_out_of_reach_for_scripts_and_other_sites(site: Site) -> None:
    cookie = site.client.get(FORM).headers["set-cookie"].lower()

    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/dashboard" in cookie


def test_what_was_seen_must_still_hold(site: Site) -> None:
    """Someone else rolls back while the dialog is open: the stale form changes nothing and says why."""
    fields = open_form(site)
    with site.sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")

    reply = send(site, fields, OWN)

    assert reply.status_code in (409, 412)
    assert champion(site) == (1, 4)
    assert 'role="alert"' in reply.text
    assert '<div class="version" id="rollback-from">v1</div>' in reply.text


def test_without_an_earlier_version_there_is_no_form(empty_site: Site) -> None:
    with empty_site.sessions.begin() as session:
        assistants.create_assistant(
            session,
            team_id=TEAM,
            name="fresh",
            base_model="smollm2-135m-instruct",
            parameter_count=1,
            context_window=1,
            actor="user",
        )

    html = empty_site.client.get("/dashboard/assistants/fresh/rollback").text
    page = empty_site.client.get("/dashboard/assistants/fresh").text

    assert "there is nothing to roll back to" in html
    assert "<form" not in html
    assert 'aria-disabled="true"' in page
    assert 'id="roll-back"' not in page


def test_damaged_files_are_not_rolled_back_to(site: Site) -> None:
    with site.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        target = versions.get_version(session, assistant, 1).id
    weights = site.home / "artifacts" / target / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")

    reply = send(site, open_form(site), OWN)

    assert reply.status_code == 409
    assert "adapter_model.safetensors" in reply.text
    assert champion(site) == (2, 3)
