"""The pages over HTTP, from a real ledger."""

import re
from html import unescape
from html.parser import HTMLParser

import pytest

from api.dashboard import serving_view
from domain.skill import ExactGrader
from registry import aliases, assistants, serving, versions
from registry.overview import overviews
from registry.tables import ServingState
from tests.seeded_story import ASSISTANT, TEAM, Story
from tests.unit.dashboard.conftest import ADDRESS, Site

HOME = f"/dashboard/assistants/{ASSISTANT}"


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_of(html: str) -> str:
    """What a reader sees, white space collapsed."""
    parser = _Text()
    parser.feed(html)
    return re.sub(r"\s+", " ", " ".join(parser.parts))


def matrix_of(html: str) -> dict[str, list[str]]:
    """Row name -> its cells' texts, as they stand in the page."""
    html = re.sub(r'<th scope="row">(\w[\w-]*)<span.*?</th>', r'<th scope="row">\1</th>', html)
    table = html[html.index('id="matrix"') : html.index("</table>", html.index('id="matrix"'))]
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.S):
        name = re.search(r'<th scope="row">(.*?)</th>', row, re.S)
        if name is not None:
            rows[name.group(1)] = [text_of(cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)]
    return rows


def test_without_assistants_the_page_says_how_to_create_one(empty_site: Site) -> None:
    reply = empty_site.client.get("/dashboard")

    assert reply.status_code == 200
    assert "No assistant yet" in text_of(reply.text)
    assert f"curl {ADDRESS}/v1/assistants" in text_of(reply.text)


def test_the_list_shows_what_serves_and_what_happens(site: Site) -> None:
    seen = text_of(site.client.get("/dashboard").text)

    assert re.search(
        r"support-bot v2 (serving|loading|failed to load) smollm2-135m-instruct 2 training", seen
    )


def test_the_matrix_holds_every_score_and_leaves_the_unmeasured_blank(site: Site) -> None:
    rows = matrix_of(site.client.get(HOME).text)

    assert rows == {
        "banking-intent": ["0% 0–6 · n 60", "85% 74–92 · n 60", "80% 68–88 · n 60", "37% 26–49 · n 60"],
        "ticket-json": ["2% 0–13 · n 40", "5% 1–17 · n 40", "82% 68–91 · n 40", "not measured"],
        "hellaswag": ["43% 34–53 · n 100", "42% 33–52 · n 100", "42% 33–52 · n 100", "38% 29–48 · n 100"],
        "ordinary": ["100% 89–100 · n 30", "not measured", "93% 79–98 · n 30", "not measured"],
        "piqa": ["67% 57–75 · n 100", "67% 57–75 · n 100", "66% 56–75 · n 100", "not measured"],
    }


def test_the_champion_and_the_blocked_version_are_marked_with_reasons(site: Site) -> None:
    html = site.client.get(HOME).text
    heads = [
        text_of(head).strip() for head in re.findall(r'<th scope="col" class="[^"]*"><div.*?</th>', html)
    ]

    assert heads == ["v0", "v1", "champion v2", "blocked v3"]
    assert "v3 blocked banking-intent fell by 43.3 points below v2; at most 10 are allowed" in text_of(html)


def test_a_cell_marks_the_version_that_taught_the_skill(site: Site) -> None:
    html = site.client.get(HOME).text

    taught = [
        unescape(title) for title in re.findall(r'class="cell heat[^"]* taught[^"]*" title="([^"]+)"', html)
    ]
    assert [title.split(":")[0] for title in taught] == [
        "v1 on banking-intent",
        "v3 on banking-intent",
        "v2 on ticket-json",
    ]
    assert taught[0].split(": ", 1)[1] == (
        "0.850 over 60 items, 95% interval 0.739 to 0.919; taught by this version's update"
    )


def test_retention_is_along_the_champions_lineage(site: Site) -> None:
    """v0 -> v1 -> v2: ACC (0.80 + 0.825)/2, banking-intent 0.85 -> 0.80, hellaswag and piqa -1 point each;
    `ordinary` is no benchmark and does not count."""
    seen = text_of(site.client.get(HOME).text)

    assert "Average accuracy 81% over learned skills" in seen
    assert "Backward transfer −5.0 pt" in seen
    assert "Worst forgetting −5.0 pt banking-intent" in seen
    assert "General drop −1.0 pt" in seen


def test_a_running_update_shows_stage_progress_and_time_left(site: Site) -> None:
    html = site.client.get(HOME).text

    assert re.findall(r'class="step (\w+)"', html) == ["done", "now", "ahead", "ahead", "ahead", "ahead"]
    assert '<progress max="60" value="34"' in html
    assert "step 34 of 60 about 2 min 20 s left" in text_of(html)


def test_the_update_page_shows_loss_recipe_gate_and_events(site: Site, story: Story) -> None:
    reply = site.client.get(f"{HOME}/updates/{story.running_update_id}")
    seen = text_of(reply.text)

    assert reply.status_code == 200
    assert 'aria-label="training loss from ' in reply.text
    assert "Rehearsal KL 0.021 nats per token" in seen
    assert "learning_rate" in seen
    assert "max_forgetting" in seen
    assert "Queued: 24 demonstrations of ticket-json." in seen
    assert "Step 34 of 60" not in seen  # steps are the curve, not the log
    assert 'hx-trigger="every 2s"' in reply.text


def test_a_finished_update_no_longer_asks_for_news(site: Site) -> None:
    listed = site.client.get(HOME).text
    blocked = re.search(r'href="([^"]+/updates/[^"]+)"><strong>banking-intent', listed)
    assert blocked is not None

    html = site.client.get(blocked.group(1)).text

    assert "hx-trigger" not in html
    assert "blocked max forgetting banking-intent 80% 37% −43.3 pt −57.0 pt to −28.0 pt" in text_of(html)


def test_a_version_shows_failed_items_first_and_escapes_what_models_wrote(site: Site) -> None:
    html = site.client.get(f"{HOME}/versions/2?open=skill-ticket-json").text
    box = html[html.index('id="skill-ticket-json" open') :]
    box = box[: box.index('<details class="box"')]

    verdicts = re.findall(r'<summary><span class="pill \w+">(\w+)</span>', box)
    assert verdicts == ["wrong"] * 7 + ["right"] * 33
    assert "&lt;b&gt;Where is my card?&lt;/b&gt; (item 33)" in box
    assert "<b>Where" not in html
    assert "7 failed" in text_of(box)


def test_a_version_shows_lineage_and_manifest(site: Site) -> None:
    html = site.client.get(f"{HOME}/versions/2").text
    with site.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        digest = versions.get_version(session, assistant, 2).manifest_sha256

    assert "Lineage v0 → v1 → v2" in text_of(html)
    assert digest is not None
    assert digest in html
    assert "adapter_model.safetensors" in html


def test_the_base_version_has_neither_recipe_nor_manifest(site: Site) -> None:
    seen = text_of(site.client.get(f"{HOME}/versions/0").text)

    assert "nothing was trained" in seen
    assert "no manifest" in seen


def test_long_suites_are_cut_and_can_be_shown_whole(site: Site) -> None:
    def items(query: str) -> tuple[int, str]:
        html = site.client.get(f"{HOME}/versions/1?open=skill-banking-intent{query}").text
        box = html[html.index('id="skill-banking-intent" open') :]
        box = box[: box.index('<details class="box"')]
        return box.count('<details class="item">'), text_of(box)

    cut, said = items("")
    whole, _ = items("&items=all")

    assert (cut, whole) == (40, 60)
    assert "20 more items: show all" in said


@pytest.mark.parametrize(
    ("answering", "error", "shown"),
    [
        (2, None, "v2 serving"),
        (2, "no slot is free", "Some engines answer with v2, others cannot: no slot is free."),
        (1, None, "v2 is being loaded; v1 answers until it is ready."),
        (1, "its files are damaged", "v2 could not be loaded: its files are damaged. v1 keeps answering."),
        (None, "no engine answers", "v2 could not be loaded: no engine answers. Nothing answers yet."),
        (None, None, "v2 is being loaded; nothing answers for support-bot yet."),
    ],
)
def test_what_serves_is_told_apart_from_what_should(
    site: Site, answering: int | None, error: str | None, shown: str
) -> None:
    with site.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        version = None if answering is None else versions.get_version(session, assistant, answering).id
        serving.record_serving(session, assistant.id, "champion", version, error)
        [seen] = overviews(session, [assistant])
        described = serving_view.serving(seen, now=0.0)
    told = f"{described.wanted.text} {described.pill.text}"

    assert shown == (described.notice.text if described.notice is not None else told)


def test_errors_are_pages(site: Site) -> None:
    for path in (
        "/dashboard/assistants/nobody",
        f"{HOME}/versions/99",
        f"{HOME}/updates/upd_none",
        "/dashboard/assistants/nobody/rollback",
    ):
        reply = site.client.get(path)
        assert reply.status_code == 404
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert site.client.get(f"{HOME}/versions/many").status_code == 422
    assert site.client.get("/dashboard/static/../app.py").status_code == 404


def test_an_update_is_not_shown_under_another_assistant(site: Site, story: Story) -> None:
    with site.sessions.begin() as session:
        other = assistants.create_assistant(
            session,
            team_id=TEAM,
            name="other",
            base_model="smollm2-135m-instruct",
            parameter_count=1,
            context_window=1,
            actor="user",
        )
        assistants.create_skill(
            session,
            other,
            name="x",
            description="",
            grader=ExactGrader(),
            holdout_fraction=0.2,
            actor="user",
        )

    assert (
        site.client.get(f"/dashboard/assistants/other/updates/{story.running_update_id}").status_code == 404
    )


def test_pages_may_load_and_run_nothing_from_elsewhere(site: Site) -> None:
    headers = site.client.get(HOME).headers

    assert headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'"
    )
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"


def test_static_files_are_cached_by_their_content(site: Site) -> None:
    page = site.client.get("/dashboard").text
    address = re.search(r'href="(/dashboard/static/dashboard\.css\?\w+)"', page)
    assert address is not None

    first = site.client.get(address.group(1))
    again = site.client.get(address.group(1), headers={"if-none-match": first.headers["etag"]})

    assert first.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in first.headers["cache-control"]
    assert (again.status_code, again.content) == (304, b"")


def test_looking_changes_nothing(site: Site, story: Story) -> None:
    def state() -> tuple[int, int]:
        with site.sessions() as session:
            assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
            champion = aliases.get_alias(session, assistant, "champion")
            return champion.revision, session.query(ServingState).count()

    before = state()
    for path in ("", "/versions/1", f"/updates/{story.running_update_id}", "/rollback"):
        assert site.client.get(HOME + path).status_code == 200
    assert state() == before
