"""The card of an assistant's traffic."""

import re

import pytest

from domain.traffic import Canary, CanaryRollback, Shadow, Traffic, WindowFigures
from registry import aliases, assistants, traffic, traffic_figures, versions
from registry.traffic_figures import Figures
from serving.latency import bucket
from tests.seeded_story import ASSISTANT, TEAM
from tests.unit.dashboard.conftest import Site
from tests.unit.dashboard.test_pages import HOME, text_of

SEEN = WindowFigures(version="v1", requests=60, errors=30, latency_p50=0.1, latency_p95=None)


@pytest.fixture
def shared_out(site: Site) -> Site:
    """v2 is the champion, v1 its canary and its shadow."""
    with site.sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, ASSISTANT)
        for alias in ("canary", "candidate"):
            aliases.move_alias(
                session,
                assistant,
                alias,
                versions.get_version(session, assistant, 1),
                kind="promote",
                reason="",
                actor="user",
                expected_revision=None,
            )
        wanted = Traffic(canary=Canary(percent=12.5), shadow=Shadow(percent=40))
        traffic.set_traffic(session, assistant, wanted, actor="user", expected_revision=None)
        champion, canary = (versions.get_version(session, assistant, number).id for number in (2, 1))
        figures = [
            Figures(assistant.id, TEAM, "champion", champion, requests=1200, latency={bucket(0.1): 1200}),
            Figures(assistant.id, TEAM, "canary", canary, requests=100, errors=7, latency={bucket(2.0): 93}),
        ]
        shadow = Figures(
            assistant.id, TEAM, "shadow", canary, requests=8, compared=8, identical=6, rouge_l=7.2
        )
        shadow.graded, shadow.agreed = 4, 3.0
        traffic_figures.add_figures(session, [*figures, shadow])
    return site


def test_nothing_is_shown_before_anything_was_shared_out(site: Site) -> None:
    assert 'id="traffic"' not in site.client.get(HOME).text


def test_each_side_has_its_share_and_its_figures(shared_out: Site) -> None:
    html = shared_out.client.get(HOME).text
    table = html[html.index('id="traffic"') :]
    seen = text_of(table[table.index("<tbody>") : table.index("</table>")])
    assert seen.split(" v")[0].strip() == "champion"
    for row in (
        # 0.1 s lies in the bucket from 0.0905 to 0.1076 s, whose middle is 98.7 ms
        "champion v2 87.5% of users 1,200 0% 99 ms 99 ms –",
        "canary v1 12.5% of users 100 7% 1.9 s 1.9 s –",
        "shadow v1 asked 40% of requests too 8 0% – – 75% same text, ROUGE-L 0.90, 75% agree",
    ):
        assert row in seen


def test_a_rollback_is_told_with_its_reason(shared_out: Site) -> None:
    with shared_out.sessions.begin() as session:
        [plan] = traffic.plans(session)
        rollback = CanaryRollback(
            rule="error_rate",
            reason="v1 was a worse canary: it failed",
            alias="canary",
            percent=12.5,
            canary=SEEN,
            champion=SEEN,
        )
        assert traffic.roll_back_canary(session, plan, rollback)
    seen = text_of(shared_out.client.get(HOME).text)
    told = "Canary rolled back: v1 was a worse canary: it failed. No other for (10 min 00|9 min ..) s."
    assert re.search(told, seen)
    assert "champion v2 100% of users" in seen
    assert "canary v1 – 100 7%" in seen
